"""The plan: the batch that fits, the same figures for `check` and a run, advice where it does not fit."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import Phi3Config, Phi3ForCausalLM

import philora
from philora.configuration.config import load_config
from philora.configuration.sections import ModelConfig
from philora.dataset import prepare
from philora.decoder_stack.choice import Choice, DeviceFacts
from philora.errors import ConfigError
from philora.models import loading as models
from philora.models.loading import load_skeleton, load_tokenizer, local_path, max_length_of, stop_token_ids
from philora.planning import plan as planning
from philora.planning.batch import GRADES, choose
from philora.planning.footprint import PARTS, Evaluated, footprint
from philora.planning.rate import measure_rate
from philora.training import readiness
from philora.training.readiness import preflight

GIB = 2**30


@pytest.fixture(scope="module")
def mini():
    """Phi-3-mini's full shape without weights, LoRA on all linear layers, in bf16 on a CPU."""
    config = Phi3Config(hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        model = philora.get_peft_model(Phi3ForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"))
    return footprint(model, ModelConfig(dtype="bfloat16"), "adamw_torch_fused", "cpu")


def plan(counted, memory, **changes):
    settings = {"row_tokens": 2048, "tokens_per_step": 8192, "rows": None, "accumulation": None, "recomputation": None}
    return choose(counted, memory=memory, **(settings | changes))


def test_parts_of_the_full_shape(mini):
    assert (mini.parameters, mini.trainable) == (3_821_079_552, 25_165_824)
    none, cheap, full = (mini.estimate(2048, grade) for grade in GRADES[:3])
    assert none.training == sum(getattr(none, name) for name in PARTS)
    assert none.activations > 1.2 * cheap.activations > 4 * full.activations
    assert none.weights == full.weights == none.files == 2 * mini.parameters, "pages of files count, and are named"
    assert none.optimizer == 8 * mini.trainable
    assert full.loading < full.training
    evaluated = mini.estimate(2048, "full", evaluation=Evaluated(8192, 16, 512))
    assert evaluated.peak == evaluated.evaluation > full.peak, "answers' keys and values may be the largest"
    packed = mini.estimate(2048, "full", evaluation=Evaluated(8192, 16, 512, mini.packed))
    assert packed.evaluation == evaluated.evaluation + mini.packed


def test_answers_by_a_graph_take_the_rows_and_tokens_that_it_is_made_for(mini):
    evaluated = Evaluated(100, 17, 400)
    plain, by_graph = (
        mini.estimate(2048, "full", evaluation=each).evaluation
        for each in (evaluated, evaluated._replace(by_graph=True))
    )
    token = 2 * mini.key_value_width * mini.element_bytes * (mini.layers + 1)
    assert by_graph - plain == (32 * 448 - 17 * 400) * token


@pytest.mark.parametrize(("kind", "by_graph"), [("cuda", True), ("cpu", False)])
def test_the_plan_says_and_counts_how_answers_go(monkeypatch, kind, by_graph):
    facts = DeviceFacts(kind=kind)
    counted = []
    count = choose
    monkeypatch.setattr(planning, "facts_of_device", lambda device: facts)
    monkeypatch.setattr(planning, "choose", lambda *args, **given: (counted.append(given), count(*args, **given))[1])
    given = {"model": {"name_or_path": "nano", "dtype": "bfloat16"}, "data": {"train": "helpdesk", "eval": 0.1}}
    found = preflight(given).plan
    assert found.answers == ("a CUDA graph for each token" if by_graph else "")
    assert [each["evaluation"].by_graph for each in counted] == [by_graph]
    assert ("answers", found.answers) in found.rows() or not by_graph


def test_on_a_gpu_the_plan_says_whether_a_run_repeats_its_bits():
    given = {"model": {"name_or_path": "nano"}, "data": {"train": "helpdesk", "eval": 0.1}}
    found = preflight(given).plan
    assert "repeatable" not in dict(found.rows())
    assert dict(replace(found, device="cuda").rows())["repeatable"].startswith("yes")
    fast = preflight(given | {"training_config": {"deterministic": False}}).plan
    assert dict(replace(fast, device="cuda").rows())["repeatable"].startswith("no")
    assert fast.to_dict()["deterministic"] is False


@pytest.mark.parametrize(
    ("quantization", "base_products", "kind"),
    [("none", None, "plain"), ("none", "fp8", "fp8"), ("nf4", None, "nf4"), ("int8", None, "int8")],
)
def test_the_kind_of_the_base_is_that_of_the_configuration(quantization, base_products, kind):
    """The model without weights is not quantised, so it cannot tell."""
    model = {"name_or_path": "nano", "quantization": quantization, "base_products": base_products}
    config = load_config({"model": model, "data": {"train": "helpdesk"}})
    adapted = planning.weightless(config, load_skeleton(ModelConfig(name_or_path="nano")))
    assert planning.base_kind(config.model, adapted) == kind


def test_check_names_graphs_in_training_by_the_kind_of_the_base(monkeypatch):
    model = {"name_or_path": "nano", "dtype": "bfloat16", "quantization": "nf4"}
    config = load_config({"model": model, "data": {"train": "helpdesk"}, "peft_config": {"lora_dropout": 0.0}})
    adapted = planning.weightless(config, load_skeleton(ModelConfig(name_or_path="nano")))
    found = preflight({"model": {"name_or_path": "nano"}, "data": {"train": "helpdesk", "eval": 0.1}}).plan
    found = replace(found, decoder_layers=Choice("stack", ("described",)), recomputation="none")

    def said(device):
        return readiness._training_graphs(config.model, adapted, found, device)

    assert said(DeviceFacts()).startswith("no (no GPU has run this yet")
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    assert said(DeviceFacts()) == "yes, up to 4,096 tokens"
    assert said(DeviceFacts(kind="cpu")) == ""


def test_fp8_that_has_no_effect_is_a_notice(monkeypatch):
    """The device is described, not there: what the plan says of it depends on the description alone."""
    monkeypatch.setattr(planning, "facts_of_device", lambda device: DeviceFacts())
    monkeypatch.setattr(models, "_check_base_products", lambda *_: None)
    given = {"model": {"name_or_path": "nano", "dtype": "bfloat16"}, "data": {"train": "helpdesk", "eval": 0.1}}
    fp8 = given | {"model": given["model"] | {"base_products": "fp8"}, "peft_config": {"lora_dropout": 0.05}}

    def notices(settings):
        return " ".join(preflight(settings).plan.notices)

    assert "model.base_products=fp8 has no effect" in notices(fp8)
    assert "dropout" in notices(fp8)
    assert "base_products" not in notices(given)
    assert "base_products" not in notices(fp8 | {"peft_config": {"lora_dropout": 0.0}})


def test_the_least_recomputation_that_fits(mini):
    assert plan(mini, 500 * GIB)[:3] == (4, 1, "none")
    sizes = {grade: mini.estimate(2048, grade).training / 0.9 for grade in GRADES[:3]}
    for grade in GRADES[:3]:
        assert plan(mini, int(1.01 * sizes[grade]))[:3] == (1, 4, grade)
    assert plan(mini, 1 * GIB)[:3] == (1, 4, "full"), "nothing fits: the least, and the run says so"


def test_a_few_tokens_at_a_time_come_last(mini):
    """Rows of 64 tokens: products of 512 rows with recomputation before products of 64 without."""
    small = mini.estimate(64, "none").training / 0.9
    found = plan(mini, int(1.03 * small), row_tokens=64)
    assert found.recomputation != "none"
    assert found.rows * 64 >= 512


def test_what_is_given_stays(mini):
    assert plan(mini, 500 * GIB, rows=3, accumulation=5, recomputation="full")[:3] == (3, 5, "full")
    assert plan(mini, 500 * GIB, accumulation=2)[:2] == (2, 2)
    assert plan(mini, 500 * GIB, processes=2)[:2] == (2, 1)


def test_rows_that_are_not_packed_need_the_memory_of_the_longest(mini):
    packed, padded = (plan(mini, 500 * GIB, row_tokens=100, longest_row_tokens=each) for each in (None, 700))
    assert packed[:2] == padded[:2] == (82, 1), "the step has as many rows"
    assert padded.estimate == mini.estimate(82 * 700, "none")
    assert padded.estimate.activations > 6 * packed.estimate.activations


def test_the_rate_is_measured_quickly_and_without_a_trace(mini):
    small = replace(mini, linears=mini.linears._replace(out_features=512, in_features=256), dtype=torch.float32)
    state = torch.get_rng_state()
    found = measure_rate(small, 256)
    assert torch.equal(state, torch.get_rng_state()), "the run's random numbers stay what they are"
    assert found.flops_per_second > 1e8
    assert found.dequantized_per_second is None
    slow = mini.flops_per_token("full", 1.0, 2048) / mini.flops_per_token("none", 1.0, 2048)
    assert 1.4 < slow < 1.5, "6 N in place of 4 N"
    assert mini.flops_per_token("none", 1.0, 2048) == pytest.approx(16.45e9, rel=0.02), "as counted by hand"


SETTINGS = {
    "model": {"name_or_path": "nano", "dtype": "float32"},
    "data": {"train": {"path": "helpdesk", "limit": 60}, "eval": None},
    "training_config": {
        "max_steps": 1,
        "max_length": 128,
        "save_strategy": "no",
        "eval_strategy": "no",
        "log_level": "info",
    },
    "peft_config": {"r": 4, "lora_alpha": 8},
}
OF_THE_MOMENT = ("rate", "step_seconds", "seconds", "available_bytes")


@pytest.fixture(scope="module")
def small_machine(tmp_path_factory):
    """A run, and a check, where a machine has less memory than the run needs."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    settings = json.loads(json.dumps(SETTINGS))
    settings["training_config"] |= {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "available_bytes", lambda device=None: 600_000_000)
        checked = preflight(settings)
        result = philora.train(settings)
    return checked, result.results, (folder / "train.log").read_text()


def test_check_and_run_have_the_same_plan(small_machine):
    checked, results, log = small_machine
    ours = {key: value for key, value in checked.plan.to_dict().items() if key not in OF_THE_MOMENT}
    theirs = {key: value for key, value in results["plan"].items() if key not in OF_THE_MOMENT}
    assert json.loads(json.dumps(ours)) == theirs
    assert results["memory"]["estimated_bytes"] == theirs["estimate"]
    assert all(f"{name} " in log for name in ("weights", "activations", "peak", "steps", "time"))
    json.dumps(checked.to_dict())


def test_a_batch_that_does_not_fit_is_trained_with_a_warning(small_machine):
    checked, results, log = small_machine
    assert results["throughput"]["steps"] == 1
    assert not results["plan"]["fits"]
    assert checked.plan.warning in checked.notices
    assert "GB at its peak, and 0.60 GB are free (a tenth is left unused)" in log
    offers = {each["setting"]: each for each in results["plan"]["changes"]}
    assert {
        "training_config.per_device_train_batch_size=2",
        "training_config.gradient_checkpointing=true",
    } <= offers.keys()
    peak = results["plan"]["estimate"]["peak"]
    assert all(peak - each["saves_bytes"] == each["peak_bytes"] < peak for each in offers.values())
    suffices = [each["peak_bytes"] <= 0.9 * 600_000_000 for each in results["plan"]["changes"]]
    assert suffices == sorted(suffices, reverse=True), "what suffices by itself comes first"
    setting = "training_config.gradient_checkpointing=true"
    assert f"{setting} saves {offers[setting]['saves_bytes'] / 1e9:.2f} GB" in log


def test_an_adapter_that_is_gone_on_with_is_planned(phi3, tmp_path):
    base = phi3()
    base.save_pretrained(tmp_path / "base")
    philora.get_peft_model(base, LoraConfig(r=3, target_modules=["o_proj"])).save_pretrained(tmp_path / "adapter")
    model = {"name_or_path": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter")}
    config = load_config(SETTINGS | {"model": model, "training_config": {"output_dir": str(tmp_path / "run")}})
    adapted = planning.weightless(config, load_skeleton(config.model))
    assert footprint(adapted, config.model, "sgd", "cpu").trainable == 2 * 3 * (32 + 32)


def test_a_context_longer_than_the_models(phi3, tmp_path):
    phi3().save_pretrained(tmp_path / "base")
    settings = SETTINGS | {"model": {"name_or_path": str(tmp_path / "base")}}
    config = load_config(settings, ["training_config.max_length=256", f"training_config.output_dir={tmp_path / 'run'}"])
    message = r"max_length=256 - expected at most 128, the context of the model. Set 128 or less"
    with pytest.raises(ConfigError, match=message):
        max_length_of(config, load_skeleton(config.model).config)
    config = load_config(settings, [f"training_config.output_dir={tmp_path / 'run'}"])
    assert max_length_of(config, load_skeleton(config.model).config) == 128, "the default takes what there is"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_plan_of_the_full_shape_takes_seconds(tmp_path, quantization):
    """From config.json alone: no weights are there. Processor time, since other tests run beside this one."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = tmp_path / "phi"
    shutil.copytree(local_path("nano"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32}
    settings = json.loads((folder / "config.json").read_text()) | shape | {"num_key_value_heads": 32}
    (folder / "config.json").write_text(json.dumps(settings))
    config = load_config(
        {
            "model": {"name_or_path": str(folder), "dtype": "bfloat16", "quantization": quantization},
            "data": {"train": {"path": "helpdesk", "limit": 20}, "eval": None},
        }
    )
    tokenizer = load_tokenizer(config.model, config.tokenizer)
    stops = stop_token_ids(tokenizer, None)
    report = prepare(config.data, tokenizer, max_length=512, seed=0, stop_token_ids=stops).report
    begun = time.process_time()
    skeleton = load_skeleton(config.model)
    found = planning.plan(config, planning.weightless(config, skeleton), report, max_length=512)
    assert time.process_time() - begun < 5
    assert found.parameters > 3e9
