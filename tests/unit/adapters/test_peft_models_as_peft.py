"""What PEFT promises of its LoRA layers holds on ours: a matrix of properties by cases, with plain PEFT as the oracle.

For each case two models of the same weights are made: `philora.get_peft_model`'s and `peft.get_peft_model`'s (slices
in PEFT's terms, as `resolve` writes them). Each property is then run on both. Where PEFT refuses, so must we, with
PEFT's message; else outputs and gradients are compared.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, create_arrow_model, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from peft.tuners.lora.config import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    KasaConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from transformers import PhiConfig, PhiForCausalLM

import philora
from philora.adapters.fast_layers import FastLinear
from philora.adapters.peft_models import apply_slices
from philora.adapters.targets import resolve
from philora.errors import AdapterError
from tests.parity.conftest import masks_of_torch  # noqa: F401  # the same masks from the same seed in both models
from tests.quick import quick

pytestmark = pytest.mark.usefixtures("masks_of_torch")

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
SPLIT = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
BIASED = ["q_proj", "v_proj", "dense", "fc1", "fc2"]  # of the older Phi, whose linear layers have biases

CASES: dict[str, dict[str, Any]] = {
    "fused": {"target_modules": FUSED},
    "slices": {"target_modules": SPLIT},
    "some slices": {"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["qkv_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["qkv_proj", "lm_head"]},
    "modules_to_save": {"target_modules": FUSED, "modules_to_save": ["lm_head"]},
    "bias all": {"target_modules": BIASED, "bias": "all"},
    "bias lora_only": {"target_modules": BIASED, "bias": "lora_only"},
    "lora_bias": {"target_modules": BIASED, "lora_bias": True},
    "rsLoRA": {"target_modules": FUSED, "use_rslora": True},
    "rsLoRA slices": {"target_modules": SPLIT, "use_rslora": True},
    "DoRA": {"target_modules": FUSED, "use_dora": True},
    "DoRA slices": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "dropout": {"target_modules": FUSED, "lora_dropout": 0.2},
    "dropout slices": {"target_modules": SPLIT, "lora_dropout": 0.2},
    "patterns": {
        "target_modules": FUSED,
        "rank_pattern": {r"layers\.0\..*": 2, "o_proj": 6},
        "alpha_pattern": {"down_proj": 3},
    },
    "layers_to_transform": {"target_modules": FUSED, "layers_to_transform": [1]},
    "PiSSA": {"target_modules": FUSED, "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": FUSED, "init_lora_weights": "olora"},
}

# fp32 sums in another order: a few ulp (6e-8), grown over two layers. Norms of whole tensors are compared; gradients
# have gone through the sums of both directions.
FP32 = 1e-6
GRADIENT_FP32 = 5e-6


def config_of(case: str, **changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | copy.deepcopy(CASES[case]) | changes))


class Pair(NamedTuple):
    mine: PeftModel
    theirs: PeftModel

    def copy_weights(self) -> None:
        self.theirs.load_state_dict(self.mine.state_dict())


@pytest.fixture
def base(phi3: Callable[..., Any]) -> Callable[[str], Any]:
    """Makes the base model of a case."""

    def make(case: str) -> Any:
        if CASES[case]["target_modules"] is not BIASED:
            return phi3()
        torch.manual_seed(0)
        config = PhiConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            resid_pdrop=0.0,
        )
        model = PhiForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4.0) if parameter.ndim == 2 else parameter.add_(0.1)
        return model

    return make


_made: dict[tuple[str, bool, torch.dtype], Pair] = {}


@pytest.fixture
def pair(base: Callable[[str], Any]) -> Callable[..., Pair]:
    """Makes the two models of a case, with one or two adapters that all do something.

    Each combination is made once and copied for every test that asks for it: injecting takes most of the time here,
    and `test_copied` compares copies with what was not copied.
    """

    def copied(case: str, second: bool = False, dtype: torch.dtype = torch.float32) -> Pair:
        if (case, second, dtype) not in _made:
            _made[case, second, dtype] = make(case, second, dtype)
        return Pair(*map(copy.deepcopy, _made[case, second, dtype]))

    def make(case: str, second: bool, dtype: torch.dtype) -> Pair:
        resolution = resolve(base(case), config_of(case))
        torch.manual_seed(1)
        mine = philora.get_peft_model(base(case).to(dtype), config_of(case))
        torch.manual_seed(1)
        both = Pair(mine, peft.get_peft_model(base(case).to(dtype), resolution.config))
        if second:
            other = resolve(base(case), config_of(case, lora_alpha=3, r=2, bias="none", init_lora_weights=True))
            for model in both:
                model.add_adapter("other", copy.deepcopy(other.config))
            apply_slices(mine, other.slices, "other")
        fill(mine)
        both.copy_weights()
        return both

    copied.fresh = make
    return copied


def fill(model: PeftModel, seed: int = 5) -> None:
    """Give every adapter values, as training would: inside the slices only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    for name, mask in outside(model).items():
        model.get_parameter(name).data[mask] = 0


def outside(model: PeftModel) -> dict[str, Tensor]:
    """By parameter: what of B belongs to no slice."""
    masks = {}
    for name, layer in model.named_modules():
        for adapter, slices in getattr(layer, "slices", {}).items():
            mask = torch.ones(layer.lora_B[adapter].weight.shape, dtype=torch.bool)
            for each in slices:
                mask[each.row_start : each.row_stop, each.rank_start : each.rank_stop] = False
            masks[f"{name}.lora_B.{adapter}.weight"] = mask
    return masks


def tokens(rows: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (rows, 12), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), **options).logits


def step(model: PeftModel) -> dict[str, Tensor]:
    """Loss and gradients of one pass in training mode; the same seed for dropout each time."""
    model.train()
    model.zero_grad()
    torch.manual_seed(11)
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **grads}


def distance(one: Tensor, other: Tensor) -> float:
    scale = other.double().norm()
    return float((one.double() - other.double()).norm() / scale) if scale else float(one.double().norm())


def flat(result: Any) -> dict[str, Tensor]:
    return result if isinstance(result, dict) else {"output": result}


def agree(
    both: Pair, run: Callable[[PeftModel], Any], tolerance: float = FP32, gradients: float = GRADIENT_FP32
) -> Any:
    """Run on both; outputs, gradients, or what they raise, must be the same. Returns ours."""
    results = []
    for model in both:
        try:
            results.append(run(model))
        except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
            results.append(error)
    mine, theirs = results
    if isinstance(theirs, Exception) or isinstance(mine, Exception):
        assert (type(mine), str(mine)) == (type(theirs), str(theirs))
        return None
    expected = flat(theirs)
    masks = outside(both.mine)
    assert flat(mine).keys() == expected.keys()
    for name, value in flat(mine).items():
        # PEFT knows nothing of slices: it has a gradient for the zeros around them too.
        want = expected[name].masked_fill(masks[name], 0) if name in masks else expected[name]
        assert distance(value, want) <= (gradients if run is step or "lora_" in name else tolerance), name
    return mine


def trainable(model: PeftModel) -> set[str]:
    return {name for name, each in model.named_parameters() if each.requires_grad}


every_case = pytest.mark.parametrize("case", CASES)
# One of each kind, for properties that do not look at how the update is scaled or where it stands.
KINDS = ["fused", "some slices", "embeddings", "modules_to_save", "bias all", "lora_bias", "DoRA slices", "patterns"]
every_kind = pytest.mark.parametrize("case", KINDS)


# ---------------------------------------------------------------------------------------- forward and backward


@every_case
def test_outputs_and_gradients(pair, base, case):
    both = pair(case)
    assert both.mine.state_dict().keys() == both.theirs.state_dict().keys()
    assert any(isinstance(each, FastLinear) for each in both.mine.modules())
    mine = agree(both, logits)
    assert distance(mine, logits(base(case))) > 1e-2, "the adapter changes nothing, so the comparison could not fail"
    grads = agree(both, step)
    assert trainable(both.mine) == trainable(both.theirs) == grads.keys() - {"loss"}


@every_case
def test_a_planted_fault_shows(pair, case):
    """The negative control of this file: one multiplier off by 1% must fail the comparison."""
    both = pair(case)
    next(each for each in both.mine.modules() if isinstance(each, FastLinear)).scaling["default"] *= 1.01
    for run in (logits, step):
        with pytest.raises(AssertionError):
            agree(both, run)


@every_kind
def test_bf16(pair, case):
    # bf16 keeps 8 bits (2^-9 by rounding); ours rounds once less per product than PEFT, which casts up and back, and
    # two layers and a softmax add up.
    both = pair(case, dtype=torch.bfloat16)
    agree(both, logits, tolerance=3e-2)
    agree(both, step, gradients=6e-2)


@every_kind
def test_gradient_checkpointing(pair, case):
    both = pair(case)
    plain = step(both.mine)
    for model in both:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    again = agree(both, step)
    assert all(distance(again[name], plain[name]) <= GRADIENT_FP32 for name in plain)


@pytest.mark.parametrize("case", ["fused", "some slices"])
def test_compiled(pair, case):
    layer = next(each for each in pair(case).mine.modules() if isinstance(each, FastLinear))
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    results = []
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = forward(x)
        grads = torch.autograd.grad(y.sin().sum(), [layer.lora_A["default"].weight, layer.lora_B["default"].weight])
        results.append([y, *grads])
    for plain, compiled in zip(*results, strict=True):
        assert distance(compiled, plain) <= FP32


@pytest.mark.parametrize("case", ["dropout", "dropout slices"])
def test_dropout_acts_in_training_only(pair, case):
    both = pair(case)
    first = step(both.mine)
    assert torch.equal(step(both.mine)["loss"], first["loss"])
    both.mine.train()
    torch.manual_seed(12)
    assert not torch.equal(both.mine(input_ids=tokens(), labels=tokens()).loss, first["loss"])
    assert torch.equal(logits(both.mine), logits(both.mine))


# --------------------------------------------------------------------------------------------- several adapters


@every_case
def test_adding_setting_and_deleting(pair, case):
    both = pair(case, second=True)
    assert both.mine.state_dict().keys() == both.theirs.state_dict().keys()
    default = agree(both, logits)

    def switch(name: str) -> Callable[[PeftModel], Tensor]:
        def run(model: PeftModel) -> Tensor:
            model.set_adapter(name)
            return logits(model)

        return run

    other = agree(both, switch("other"))
    assert distance(other, default) > 1e-3
    assert trainable(both.mine) == trainable(both.theirs)
    agree(both, step)
    assert torch.equal(agree(both, switch("default")), default)
    assert trainable(both.mine) == trainable(both.theirs)
    for model in both:
        model.delete_adapter("other")
    assert both.mine.state_dict().keys() == both.theirs.state_dict().keys()
    assert not any("other" in name for name in both.mine.state_dict())
    assert torch.equal(agree(both, logits), default)
    agree(both, lambda model: model.delete_adapter("other"))
    agree(both, lambda model: model.set_adapter("other"))


@every_kind
def test_the_active_adapter_may_be_deleted(pair, case):
    both = pair(case, second=True)
    for model in both:
        model.delete_adapter("default")
    assert both.mine.active_adapters == both.theirs.active_adapters
    agree(both, logits)
    agree(both, step)
    assert trainable(both.mine) == trainable(both.theirs)


@every_case
def test_several_active_at_once(pair, case):
    both = pair(case, second=True)

    def run(model: PeftModel) -> dict[str, Tensor]:
        model.base_model.set_adapter(["default", "other"])
        return {"output": logits(model), **step(model)}

    agree(both, run)
    assert trainable(both.mine) == trainable(both.theirs)


@every_kind
def test_a_name_that_is_used_again_starts_anew(pair, base, case):
    """After `delete_adapter` nothing of the old adapter may be left, neither its slices nor its scaling."""
    both = pair(case, second=True)
    fresh = resolve(base("fused"), config_of("fused", r=3)).config
    if CASES[case]["target_modules"] is BIASED:
        fresh = config_of(case, r=3, bias="none", lora_bias=False)
    for model in both:
        model.set_adapter("other")
        model.delete_adapter("default")
        model.add_adapter("default", copy.deepcopy(fresh))
        model.set_adapter("default")
    fill(both.mine, seed=8)
    both.copy_weights()
    agree(both, logits)
    agree(both, step)


@every_kind
def test_mixed_batches(pair, case):
    both = pair(case, second=True)
    mixed = agree(both, lambda model: logits(model, adapter_names=["other", "__base__"]))
    if mixed is not None:
        for row, name in enumerate(["other", None]):
            if name:
                both.mine.set_adapter(name)
                alone = logits(both.mine)
            else:
                with both.mine.disable_adapter():
                    alone = logits(both.mine)
            assert distance(mixed[row], alone[row]) <= FP32


@pytest.mark.parametrize("case", ["fused", "slices", "DoRA", "modules_to_save"])
@pytest.mark.parametrize("names", [["default", "nobody"], ["default"], "training", "merged"])
def test_mixed_batches_that_peft_refuses(pair, case, names):
    both = pair(case, second=True)

    def run(model: PeftModel) -> Tensor:
        model.train(names == "training")
        if names == "merged":
            model.merge_adapter()
        given = names if isinstance(names, list) else ["default", "other"]
        return model(input_ids=tokens(), adapter_names=given).logits

    with pytest.raises(ValueError, match=r"adapter"):
        run(both.theirs)
    both = pair(case, second=True)  # after an error PEFT's hooks for the names stay behind
    assert agree(both, run) is None


# -------------------------------------------------------------------------------------------------- switching off


@every_case
def test_disabled(pair, base, case):
    both = pair(case, second=True)
    before = logits(both.mine)

    def off(model: PeftModel) -> Tensor:
        with model.disable_adapter():
            with model.disable_adapter():
                inner = logits(model)
            return torch.stack([inner, logits(model)])

    inner, outer = agree(both, off)
    if CASES[case].get("init_lora_weights") is None:  # those change the base
        assert distance(outer, logits(base(case))) <= FP32
        assert torch.equal(inner, outer)
    assert torch.equal(agree(both, logits), before)
    assert trainable(both.mine) == trainable(both.theirs)

    def fails(model: PeftModel) -> None:
        with model.disable_adapter():
            raise ValueError("inside")

    agree(both, fails)
    assert torch.equal(agree(both, logits), before)
    for model in both:
        model.base_model.disable_adapter_layers()
    agree(both, logits)
    for model in both:
        model.base_model.enable_adapter_layers()
    assert torch.equal(agree(both, logits), before)


# -------------------------------------------------------------------------------------------------------- merging


def classes(model: Any) -> dict[str, type]:
    return {name: type(each) for name, each in model.named_modules()}


def base_weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items() if "lora_" not in name}


@every_case
def test_merged_and_unmerged(pair, case):
    both = pair(case, second=True)
    before, weights = logits(both.mine), base_weights(both.mine)
    for names in (["default"], ["other"], ["default", "other"]):

        def merge(model: PeftModel, names: list[str] = names) -> dict[str, Tensor]:
            model.merge_adapter(names)
            return base_weights(model)

        agree(both, merge, tolerance=0)
        agree(both, logits)

        def unmerge(model: PeftModel) -> dict[str, Tensor]:
            model.unmerge_adapter()
            return {"output": logits(model), **base_weights(model)}

        agree(both, unmerge)
    # Adding and subtracting an update of about the weight's size rounds each time.
    assert distance(logits(both.mine), before) <= 1e-5
    assert all(distance(each, weights[name]) <= FP32 for name, each in base_weights(both.mine).items())


@every_case
def test_merged_and_unloaded(pair, base, case):
    both = pair(case)
    safe = "slices" in case or "DoRA" in case
    before = logits(both.mine)
    merged = Pair(*(model.merge_and_unload(safe_merge=safe) for model in both))
    assert classes(merged.mine) == classes(philora.optimize(base(case)))
    assert merged.mine.state_dict().keys() == base(case).state_dict().keys()
    agree(merged, lambda model: dict(model.state_dict()), tolerance=0)
    assert distance(logits(merged.mine), before) <= 1e-5  # weights of unit size are rounded once more


@every_kind
def test_unloaded(pair, base, case):
    both = pair(case)
    plain = Pair(*(model.unload() for model in both))
    assert classes(plain.mine) == classes(philora.optimize(base(case)))
    agree(plain, lambda model: dict(model.state_dict()), tolerance=0)
    if CASES[case].get("init_lora_weights") is None and "modules_to_save" not in CASES[case]:
        assert all(torch.equal(each, plain.mine.state_dict()[name]) for name, each in base(case).state_dict().items())


@pytest.mark.parametrize("case", ["fused", "slices", "lora_bias", "DoRA"])
def test_a_safe_merge_refuses_nan_and_changes_nothing(pair, case):
    both = pair(case)
    layer = next(name for name, each in both.mine.named_modules() if isinstance(each, FastLinear))
    for model in both:
        model.get_submodule(layer).lora_A["default"].weight.data[0, 0] = float("nan")
    before = base_weights(both.mine)

    def merge(model: PeftModel) -> None:
        model.get_submodule(layer).merge(safe_merge=True)

    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge(both.mine)
    agree(both, merge)
    assert all(torch.equal(each, before[name]) for name, each in base_weights(both.mine).items())


@every_kind
def test_weighted_adapters(pair, case):
    both = pair(case, second=True)
    for kind in ("linear", "svd", "cat"):
        # `linear` wants equal ranks: the adapter with itself, once negative.
        names = ["default", "default" if kind == "linear" else "other"]

        def add(model: PeftModel, kind: str = kind, names: list[str] = names) -> dict[str, Tensor]:
            model.add_weighted_adapter(names, [0.7, -0.4], kind, combination_type=kind)
            model.set_adapter(kind)
            return {"output": logits(model), **step(model)}

        # The signs of singular vectors are free, but PEFT computes them in both models from the same bits.
        agree(both, add)
        assert trainable(both.mine) == trainable(both.theirs)


# --------------------------------------------------------------------------------------------- files and copies


@pytest.mark.parametrize("case", quick(CASES, KINDS))
def test_saved_and_loaded(pair, base, case, tmp_path):
    """Two adapters, each read again by PEFT alone and by us, also without memory for a first random adapter."""
    both = pair(case, second=True)
    expected = {}
    for name in ("default", "other"):
        both.mine.set_adapter(name)
        expected[name] = logits(both.mine)
    both.mine.save_pretrained(tmp_path / "mine")
    both.theirs.save_pretrained(tmp_path / "theirs")

    def files(root: Any) -> set[str]:
        return {str(each.relative_to(root)) for each in root.rglob("*") if each.is_file()} - {
            "philora.json",
            "other/philora.json",
        }

    assert files(tmp_path / "mine") == files(tmp_path / "theirs")
    for name, folder in (("default", tmp_path / "mine"), ("other", tmp_path / "mine" / "other")):
        for low in (False, True):
            read = []
            for load in (philora.load_adapter, PeftModel.from_pretrained):
                if low and CASES[case].get("init_lora_weights") and name == "default":
                    # PiSSA and OLoRA change the base when they are injected, which an adapter without memory cannot.
                    with pytest.raises((RuntimeError, AdapterError), match="incompatible tensor type"):
                        load(base(case), str(folder), low_cpu_mem_usage=True)
                else:
                    read.append(load(base(case), str(folder), low_cpu_mem_usage=low))
            if read:
                again = agree(Pair(*read), logits)
            if read and not CASES[case].get("init_lora_weights"):
                assert distance(again, expected[name]) <= FP32
    if CASES[case].get("init_lora_weights"):
        return
    several = PeftModel.from_pretrained(base(case), str(tmp_path / "mine"))
    several.load_adapter(str(tmp_path / "mine" / "other"), "other")
    philora.optimize(several)
    several.set_adapter("other")
    assert distance(logits(several), expected["other"]) <= FP32


def by_pickle(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_copied(pair, case, duplicate):
    both = pair.fresh(case, True, torch.float32)
    copied = Pair(duplicate(both.mine), both.theirs)
    assert type(copied.mine) is type(both.mine)
    agree(copied, logits)
    agree(copied, step)
    with torch.no_grad():
        for name, each in copied.mine.named_parameters():
            if "lora_" in name:
                each.zero_()
    agree(both, logits)


@every_case
def test_hotswapped(pair, base, case, tmp_path):
    both = pair(case)
    swapped = pair(case)
    fill(swapped.mine, seed=21)
    expected = logits(swapped.mine)
    swapped.mine.save_pretrained(tmp_path)

    def swap(model: PeftModel) -> Tensor:
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
        return logits(model)

    mine = agree(both, swap)
    if (
        mine is not None and case != "patterns"
    ):  # PEFT computes the multiplier from r and lora_alpha alone when it swaps
        assert distance(mine, expected) <= FP32
    agree(both, step)


# ------------------------------------------------------------------------------- slices where PEFT does not know them


def test_a_slice_adapter_that_is_deleted_is_not_recorded(pair, base, tmp_path):
    model = pair("slices", second=True).mine
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", config_of("fused"))
    fill(model, seed=8)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "philora.json").exists()
    assert (tmp_path / "other" / "philora.json").exists()
    assert distance(logits(philora.load_adapter(base("fused"), tmp_path)), logits(model)) <= FP32


def test_a_sliced_adapter_beside_a_fused_one(pair):
    """Each name in a mixed batch and each active adapter keeps its own kind."""
    both = pair("slices")
    for model in both:
        model.add_adapter("other", config_of("fused", r=3))
    fill(both.mine)
    both.copy_weights()
    agree(both, lambda model: logits(model, adapter_names=["default", "other"]))
    for names in (["other"], ["default", "other"], ["default"]):

        def run(model: PeftModel, names: list[str] = names) -> dict[str, Tensor]:
            model.base_model.set_adapter(names)
            return {"output": logits(model), **step(model)}

        agree(both, run)


def test_slices_over_a_quantised_base(phi3, tmp_path):
    """The zeros around the slices stay there too; the table says what is adapted."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, Phi3ForCausalLM

    phi3(hidden_size=64, intermediate_size=64, num_hidden_layers=1).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = Phi3ForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    model = philora.get_peft_model(base, config_of("some slices"))
    layer = model.base_model.model.model.layers[0].self_attn.qkv_proj
    assert type(layer).__qualname__ == "FastLinear4bit"
    for each in (model, copy.deepcopy(model)):
        layer = each.base_model.model.model.layers[0].self_attn.qkv_proj
        step(each)
        grad = layer.lora_B["default"].weight.grad
        assert grad[:64, :4].any()
        assert grad[96:, 4:].any()
        assert not grad[:64, 4:].any()
        assert not grad[64:, :4].any()
        rows = {(row.module.rpartition(".")[2], row.slice) for row in philora.coverage(each).rows}
        assert rows == {("qkv_proj", "q_proj"), ("qkv_proj", "v_proj"), ("gate_up_proj", "up_proj"), ("o_proj", "")}


# ------------------------------------------------------------------------------------- the variants that PEFT offers

# By the row of the table in docs/loralib.md: what to give LoraConfig, and which forward it runs on.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "rsLoRA": ({"use_rslora": True}, "fused"),
    "rank and alpha patterns": ({"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 3}}, "fused"),
    "DoRA": ({"use_dora": True}, "PEFT's"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "fused"),
    "OLoRA": ({"init_lora_weights": "olora"}, "fused"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "fused"),
    "MiCA": ({"init_lora_weights": "mica"}, "PEFT's"),
    "EVA": ({"init_lora_weights": "eva"}, "fused"),
    "CorDA": ({"init_lora_weights": "corda", "corda_config": CordaConfig()}, "fused"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}, "fused"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "PEFT's"),
    "KaSA": ({"kasa_config": KasaConfig()}, "PEFT's"),
    "VeLoRA": ({"velora_config": VeloraConfig()}, "PEFT's"),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, "PEFT's"),
    "BD-LoRA": (
        {
            "use_bdlora": BdLoraConfig(
                target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["qkv_proj", "gate_up_proj"], nblocks=2
            )
        },
        "PEFT's",
    ),
    "lora_bias": ({"lora_bias": True}, "PEFT's"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "fused"),
    "trainable_token_indices": ({"trainable_token_indices": [5, 6]}, "fused"),
}


def batch(rows: int = 2) -> dict[str, Tensor]:
    ids = tokens(rows)
    ids[:, 4:6] = torch.tensor([5, 6])  # what invokes an aLoRA
    return {"input_ids": ids, "labels": ids}


def prepare(name: str, model: Any, config: LoraConfig) -> None:
    """The pass over data that some initialisations want before the adapter is made."""
    if name == "CorDA":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: model(**batch(rows=1)))
    if name == "LoRA-GA":
        preprocess_loraga(model, config, lambda: model.train()(**batch()).loss.backward())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(phi3, name, tmp_path):
    changes, forward = VARIANTS[name]
    if name == "CorDA":
        pytest.importorskip("attr")  # which PEFT imports for it and does not ask for
    models = []
    for get in (philora.get_peft_model, peft.get_peft_model):
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=FUSED, **copy.deepcopy(changes))
        base = phi3()
        prepare(name, base, config)
        torch.manual_seed(1)
        models.append(get(base, config))
        if name == "EVA":
            initialize_lora_eva_weights(models[-1], [batch(), batch()], show_progress_bar=False)
    both = Pair(*models)
    # EVA's A are singular vectors of activations, which ours computes in another order.
    start = {key: each for key, each in both.mine.state_dict().items() if "lora_" in key}
    expected = both.theirs.state_dict()
    assert all(distance(each, expected[key]) <= (1e-4 if name == "EVA" else 0) for key, each in start.items())
    if name not in ("PiSSA", "OLoRA", "orthogonal", "CorDA", "LoRA-GA"):  # which start with a B
        with torch.no_grad():
            for key, each in both.mine.named_parameters():
                if "lora_B" in key or "lora_A" in key:
                    each.add_(0.05 * torch.sin(torch.arange(each.numel(), dtype=torch.float32)).view_as(each))
    both.copy_weights()

    def run(model: PeftModel) -> dict[str, Tensor]:
        model.train()
        torch.manual_seed(11)
        output = model(**batch())
        output.loss.backward()
        grads = {f"lora_ {key}": each.grad for key, each in model.named_parameters() if each.grad is not None}
        return {"output": output.logits.detach(), **grads}

    # MonteCLoRA's priors have gradients of 1e-7, where the sums of loss and regulariser cancel.
    assert len(agree(both, run, gradients=1e-3 if name == "MonteCLoRA" else GRADIENT_FP32)) > 4
    layers = [each for each in both.mine.modules() if isinstance(each, FastLinear)]
    assert layers
    assert {each.plain_adapter() is not None for each in layers} == {forward == "fused"}
    if name != "CorDA":  # which wants its pass over data again
        both.mine.save_pretrained(tmp_path)
        read = Pair(philora.load_adapter(phi3(), tmp_path), PeftModel.from_pretrained(phi3(), str(tmp_path)))
        again = agree(read, lambda model: model.eval()(**batch()).logits.detach())
        if name != "LoRA-GA":  # which has changed the base, and does not when it is read
            assert distance(again, both.mine.eval()(**batch()).logits.detach()) <= FP32
    layers[0].scaling["default"] *= 1.01  # negative control
    with pytest.raises(AssertionError):
        agree(both, run)


@pytest.mark.parametrize("name", ["LoRA-FA", "Riemannian preconditioning"])
def test_optimizers_of_peft(pair, name):
    """They change which gradients are wanted (LoRA-FA freezes A) and read the layers by their names."""

    def run(model: PeftModel) -> dict[str, Tensor]:
        if name == "LoRA-FA":
            optimizer = create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=1e-2)
        else:
            optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
        for _ in range(2):
            step(model)
            optimizer.step()
        return {key: each.detach() for key, each in model.named_parameters() if "lora_" in key}

    both = pair("fused")
    before = {key: each.detach().clone() for key, each in both.mine.named_parameters()}
    after = agree(both, run)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if "lora_B" in key or name != "LoRA-FA"}


def test_arrow(pair, phi3, tmp_path):
    """PEFT's router over several adapters runs its own forward on our layers."""
    both = pair("fused", second=False)
    for seed, folder in enumerate(("one", "two")):
        fill(both.mine, seed)
        both.mine.save_pretrained(tmp_path / folder)
    models = []
    for _ in range(2):
        paths = [str(tmp_path / "one"), str(tmp_path / "two")]
        models.append(create_arrow_model(phi3(), paths, arrow_config=ArrowConfig(top_k=1)))
    philora.optimize(models[0])
    assert any(isinstance(each, FastLinear) for each in models[0].modules())

    def run(model: PeftModel) -> Tensor:
        torch.manual_seed(11)  # the router's directions come from a randomised decomposition, made when first used
        return logits(model)

    routed = agree(Pair(*models), run)
    assert distance(routed, logits(both.mine)) > 1e-3


def test_the_table_of_variants_says_what_runs():
    text = (Path(__file__).parents[3] / "docs" / "loralib.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    forwards = {cells[0].strip("`"): cells[-1] for cells in rows}
    for name, (_, forward) in VARIANTS.items():
        assert forwards[name] == forward, name
