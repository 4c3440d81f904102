"""The decoder stack in a run: its settings, what `philora check` says, the trainer, a resumed training."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

import philora
from philora.configuration.config import load_config
from philora.decoder_stack import layer, products, trial
from philora.decoder_stack.choice import ModelFacts
from philora.decoder_stack.model import StackSettings
from philora.errors import ConfigError, ModelError
from philora.families import longrope_switch_tokens
from philora.models.loading import load_skeleton, local_path
from philora.training import loop as loop_module
from tests.conftest import make_phi3

CHAT = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}."}]}
    for n in range(8)
]


def test_the_settings_are_read():
    config = load_config({"data": {"train": "helpdesk"}})
    assert config.model.base_products is None
    assert config.training_config["deterministic"] is True
    other = load_config({"data": {"train": "helpdesk"}, "model": {"base_products": "fp8"}})
    assert other.model.base_products == "fp8"
    with pytest.raises(ConfigError, match=r"model.base_products='fp4' - expected one of auto, int8, fp8 or null"):
        load_config({"data": {"train": "helpdesk"}, "model": {"base_products": "fp4"}})
    with pytest.raises(ConfigError, match=r"training_config.deterministic='x' - expected"):
        load_config({"data": {"train": "helpdesk"}, "training_config": {"deterministic": "x"}})
    with pytest.raises(ConfigError, match="SFTConfig: deterministic=3 - expected"):
        philora.SFTConfig("out", deterministic=3)


def model_config(**settings):
    return load_config({"data": {"train": "helpdesk"}, "model": {"name_or_path": "nano"} | settings}).model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"base_products": "fp8"}, "null or auto on this machine, because fp8 products need a CUDA GPU"),
        ({"base_products": "int8"}, "null, auto or fp8, because int8 products on a CPU"),
    ],
)
def test_products_that_this_machine_has_not_are_refused(monkeypatch, settings, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=expected):
        load_skeleton(model_config(**settings))
    load_skeleton(model_config(base_products="auto"))


def test_fp8_over_a_quantised_base_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ModelError, match="null or auto over a quantised base"):
        load_skeleton(model_config(base_products="fp8", quantization="nf4"))


def test_check_says_which_way_the_layers_go(jsonl, cli):
    file = jsonl(CHAT)
    settings = {"model": {"name_or_path": "nano"}, "data": {"train": str(file), "eval": None}}
    found = philora.preflight(settings | {"peft_config": {"lora_dropout": 0.0}})  # no GPU has run dropout yet
    if torch.cuda.is_available():
        assert found.hardware.decoder_layers == "stack"
        return
    assert (found.hardware.attention, found.hardware.elementwise, found.plan.answers) == ("tiles", "", "")
    assert "attention: tiles (the device is a CPU)" in str(found.hardware)
    assert found.hardware.decoder_layers == "modules"
    assert "the decoder stack needs a CUDA GPU, this is a CPU" in str(found.hardware)
    assert found.hardware.memory_bytes > 0
    assert json.loads(json.dumps(found.to_dict()))["hardware"]["device"] == "a CPU"


def test_nano_is_of_the_family():
    assert longrope_switch_tokens(load_skeleton(model_config()).config) is None


# --------------------------------------------------------------------------------------------------- the trial


def test_the_layer_agrees_with_peft_and_a_fault_does_not(monkeypatch):
    monkeypatch.setattr(trial, "LENGTHS", (1, 4))
    monkeypatch.setattr(trial, "WINDOW_TOKENS", 3)
    cpu = torch.device("cpu")
    assert max(trial.compare(cpu, torch.float32)) < 1e-5
    state = torch.get_rng_state()
    rotate = layer.kernels.rotate_
    monkeypatch.setattr(layer.kernels, "rotate_", lambda qkv, cos, sin, *rest: rotate(qkv, cos, -sin, *rest))
    assert max(trial.compare(cpu, torch.float32)) > 1e-2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "product", "largest"),
    [("nf4", "DequantizedProduct", 1e-5), pytest.param("fp8", "Fp8Product", 0.05, marks=pytest.mark.slow)],
)
def test_the_trial_compares_the_base_that_trains(monkeypatch, base, product, largest):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    cpu, kind = torch.device("cpu"), getattr(products, product)
    seen, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (seen.append(self), forward(self, x))[1])
    assert max(trial.compare(cpu, torch.float32, base=base)) < largest
    assert len(seen) == 4
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.5 * forward(self, x))
    assert max(trial.compare(cpu, torch.float32, base=base)) > trial.LARGEST_DIFFERENCE_IN_FP8, "negative control"


def test_another_base_is_compared_again(monkeypatch, tmp_path):
    monkeypatch.delenv("PHILORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card = type("Card", (), {"name": "NVIDIA H200"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    asked = []

    def compare(*given):
        asked.append(given[-1])
        return trial.Differences(0.1, 0.1)

    monkeypatch.setattr(trial, "compare", compare)
    trial._disagreement.cache_clear()
    found = [trial.disagreement(torch.device("cuda"), ModelFacts(base=base)) for base in ("plain", "nf4", "fp8", "fp8")]
    trial._disagreement.cache_clear()
    assert asked == ["plain", "nf4", "fp8"]
    assert (tmp_path / "philora" / "decoder_stack.json").is_file()
    assert [item is None for item in found] == [False, False, True, True]  # fp8 alone rounds as much


def test_what_the_trial_finds_is_remembered_only_where_it_agrees(monkeypatch, tmp_path):
    monkeypatch.setenv("PHILORA_CACHE", str(tmp_path))
    card = type("Card", (), {"name": "NVIDIA H200"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    errors = RuntimeError("no C compiler\nat all"), OutOfResources(300000, 232448, "shared memory")
    results = iter([trial.Differences(0.01, 0.3), *errors, trial.Differences(0.01, 0.02)])

    def compare(*_):
        found = next(results)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(trial, "compare", compare)

    def ask():
        trial._disagreement.cache_clear()
        return trial.disagreement(torch.device("cuda"), ModelFacts())

    assert "differs from plain PEFT here by 0.3 (at most 0.05 is rounding)" in ask()
    assert ask() == "the decoder stack does not run here (RuntimeError: no C compiler)"
    assert "does not run here (OutOfResources: out of resource: shared memory" in ask()
    assert ask() is None
    assert ask() is None  # not computed again
    assert len(json.loads((tmp_path / "decoder_stack.json").read_text())) == 1
    trial._disagreement.cache_clear()


# -------------------------------------------------------------------------------------------------- the trainer


def trainer(folder, steps=4, dropout=0.25, **settings):
    """A training of one packed row of twelve tokens a step."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (12,), generator=generator).tolist() for _ in range(8)]
    arguments = philora.SFTConfig(
        str(folder), max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=1, learning_rate=1e-2,
        bf16=False, use_cpu=True, gradient_checkpointing=False, packing=True, max_length=12, save_steps=2,
        dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1, report_to="none", disable_tqdm=True,
        eval_strategy="no", **settings,
    )  # fmt: skip
    return philora.SFTTrainer(
        make_phi3(num_hidden_layers=1),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows, "seq_lengths": [[5, 7]] * len(rows)}),
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"),
    )


def settings_of(made) -> StackSettings:
    return made.model.get_base_model().model.stack_settings


def test_the_trainer_passes_the_switch_on(tmp_path):
    assert settings_of(trainer(tmp_path)).deterministic
    assert not settings_of(trainer(tmp_path, deterministic=False)).deterministic


@pytest.mark.slow
def test_a_resumed_training_has_the_bits_of_one_that_went_through(tmp_path, monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "all")
    ran = []
    run = layer.DecoderLayer.__call__
    monkeypatch.setattr(layer.DecoderLayer, "__call__", lambda self, *a: (ran.append(1), run(self, *a))[1])

    def adapter(made):
        return torch.cat([each.detach().flatten() for name, each in made.model.named_parameters() if "lora_" in name])

    trainer(tmp_path / "b", steps=2, lr_scheduler_type="constant").train()
    constant = trainer(tmp_path / "c", lr_scheduler_type="constant")
    constant.train()
    assert len(ran) == 2 + 4
    resumed = trainer(tmp_path / "b", lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(adapter(resumed), adapter(constant))
    monkeypatch.setattr(loop_module, "set_dropout_state", lambda *_: None)  # a planted fault
    forgot = trainer(tmp_path / "d", lr_scheduler_type="constant")
    forgot.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert not torch.equal(adapter(forgot), adapter(constant))
