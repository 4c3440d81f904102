from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from philora.configuration import schema
from philora.configuration.config import load_config
from philora.configuration.fields import FIELDS, LIBRARY, OWN_TRAINING_KEYS
from philora.configuration.sections import Config, SourceConfig
from philora.configuration.spellings import translate_trainer_keywords, translate_training_arguments
from philora.configuration.writing import dump_yaml, explain, reference
from philora.errors import ConfigError, shorten

# The dicts of the model card's sample_finetune.py, key for key.
S4_TRAINING = {
    "bf16": True,
    "do_eval": False,
    "learning_rate": 5.0e-06,
    "log_level": "info",
    "logging_steps": 20,
    "logging_strategy": "steps",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "max_steps": -1,
    "output_dir": "./checkpoint_dir",
    "overwrite_output_dir": True,
    "per_device_eval_batch_size": 4,
    "per_device_train_batch_size": 4,
    "remove_unused_columns": True,
    "save_steps": 100,
    "save_total_limit": 1,
    "seed": 0,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.2,
}
S4_PEFT = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "target_modules": "all-linear",
    "modules_to_save": None,
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(text: str | bytes, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def with_train(**sections: Any) -> dict[str, Any]:
    data = {"train": "helpdesk"} | sections.pop("data", {})
    return {"data": data, **sections}


def faults_of(source: Any, overrides: typing.Sequence[str] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    lines = str(caught.value).splitlines()
    if len(lines) == 1:
        return lines
    assert lines[0] == f"{len(lines) - 1} faults:"
    return [line.removeprefix("  ") for line in lines[1:]]


def fault_of(source: Any, overrides: typing.Sequence[str] = ()) -> str:
    (only,) = faults_of(source, overrides)
    return only


# --- what stands nowhere else ----------------------------------------------------------------------------


def test_a_fault_is_reported_at_once_and_without_heavy_imports(write: Callable[..., Path]) -> None:
    path = write("data: {train: helpdesk}\ntraining_config: {learning_rate: 0}\n")
    code = (
        "import sys, time\n"
        "from philora.configuration.config import load_config\n"
        f"try: load_config({str(path)!r})\n"
        "except ValueError as error: print(error)\n"
        "heavy = ('torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print(time.process_time())\n"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        message, heavy, seconds = done.stdout.splitlines()
        assert "training_config.learning_rate=0" in message
        assert heavy == "[]"
        times.append(float(seconds))
    assert min(times) < 0.4


# --- true to the installed libraries ---------------------------------------------------------------------


def _real_fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(kind) if field.init}


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)


@pytest.fixture(scope="module")
def libraries() -> tuple[type, type]:
    from peft import LoraConfig
    from trl import SFTConfig

    return SFTConfig, LoraConfig


def test_the_keys_and_defaults_are_those_of_the_installed_classes(libraries: tuple[type, type]) -> None:
    for kind, read in zip(libraries, (schema.training_fields(), schema.lora_fields()), strict=True):
        real = _real_fields(kind)
        assert set(read) == set(real)
        for name, field in real.items():
            if read[name].default is not schema.UNKNOWN:
                assert read[name].default == _default_of(field), name
    unknown = [name for name, field in schema.training_fields().items() if field.default is schema.UNKNOWN]
    assert unknown == ["optim"]


def test_every_default_of_the_libraries_fits_its_rule() -> None:
    for fields in (schema.training_fields(), schema.lora_fields()):
        for name, field in fields.items():
            if field.default is not schema.UNKNOWN:
                assert field.rule.read(field.default) == field.default, name


def test_a_dumped_sft_config_loads(libraries: tuple[type, type], tmp_path: Path) -> None:
    arguments = libraries[0](output_dir=str(tmp_path), use_cpu=True, bf16=False).to_dict()
    given = {key: value for key, value in arguments.items() if key in schema.training_fields()}
    for key in ("hub_token", "push_to_hub_token"):
        given.pop(key, None)
    given["eval_steps"] = None
    config = load_config(with_train(training_config=given))
    assert config.training_config["learning_rate"] == arguments["learning_rate"]


def test_the_words_of_enumerations_are_those_of_the_installed_classes() -> None:
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames, trainer_log_levels

    fields = schema.training_fields()
    for key, kind in (
        ("lr_scheduler_type", SchedulerType),
        ("optim", OptimizerNames),
        ("eval_strategy", IntervalStrategy),
        ("save_strategy", SaveStrategy),
    ):
        assert set(fields[key].rule.choices) == {each.value for each in kind}
        assert fields[key].rule.read(next(iter(kind))) == next(iter(kind)).value
    assert set(fields["log_level"].rule.choices) == set(trainer_log_levels)


def test_the_nested_keys_are_those_of_the_installed_classes() -> None:
    from peft.tuners.lora import config as lora
    from transformers import BitsAndBytesConfig

    nested = {field.nested for field in schema.lora_fields().values() if field.nested}
    assert {"EvaConfig", "CordaConfig", "LoftQConfig"} <= nested
    for name in nested:
        assert set(schema.lora_nested_fields(name)) == set(_real_fields(getattr(lora, name)))
    arguments = typing.cast(Any, BitsAndBytesConfig.__init__).__code__
    names = arguments.co_varnames[1 : arguments.co_argcount]
    assert tuple(schema.quantization_fields()) == names


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    schema._module.cache_clear()
    with pytest.raises(ConfigError, match=r"trl: not installed - expected it beside philora\. Run `pip"):
        schema._module("trl", "trainer/sft_config.py")


def test_every_field_of_the_table_exists_and_its_default_fits() -> None:
    for key, field in FIELDS.items():
        section, _, name = key.partition(".")
        assert field.doc
        if section == "training_config":
            assert name in schema.training_fields() or name in OWN_TRAINING_KEYS
        if section == "peft_config":
            assert name in schema.lora_fields()
        if field.default not in (LIBRARY, dataclasses.MISSING) and key != "data.train":
            assert field.rule.read(field.default) == field.default


def test_the_reference_names_every_field_once() -> None:
    lines = reference().splitlines()
    assert lines[0] == "| key | default | allowed | what it is |"
    for key in FIELDS:
        assert sum(line.startswith(f"| `{key}` |") for line in lines) == 1
    assert "| `peft_config.r` | `16` | a whole number of at least 1 | rank of the adapters |" in lines
    assert any("TRL's: chosen" not in line and "| TRL's: `1.0` |" in line for line in lines)


# --- defaults, dumping and origins -----------------------------------------------------------------------


def test_the_defaults_of_a_run() -> None:
    config = load_config(with_train())
    training = config.training_config
    assert config.model.name_or_path == "nano"
    assert config.data.train == (SourceConfig("helpdesk"),)
    assert config.data.eval == 0.05
    assert training["warmup_steps"] == 0.03
    assert training["packing"] is True
    assert training["max_length"] == 2048
    assert training["output_dir"] == "runs/philora"
    automatic = {key for key, value in training.items() if value == "auto"}
    assert automatic == {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_checkpointing",
        "bf16",
        "tokens_per_step",
        "learning_rate",
    }
    assert config.peft_config == {key: value for key, value in S4_PEFT.items() if value is not None}
    assert not config.notices
    assert set(config.origins.values()) == {"default", "python"}


def test_the_run_folder_is_named_after_the_file(write: Callable[..., Path]) -> None:
    config = load_config(write("data: {train: helpdesk}", "clinic.yaml"))
    assert config.training_config["output_dir"] == "runs/clinic"
    assert config.source.endswith("clinic.yaml")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data": {"train": [{"path": "a/b", "limit": 3, "columns": {"user": "{q}", "assistant": "{a}"}}, "helpdesk"]}},
        {"data": {"eval": None}},
        {"data": {"eval": {"path": "a/b", "split": "test"}}},
        {"model": {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}},
        {"training_config": S4_TRAINING, "peft_config": S4_PEFT},
        {"training_config": {"learning_rate": 5e-6, "lr_scheduler_kwargs": {"num_cycles": 2}}},
        {"peft_config": {"target_modules": {"o_proj", "down_proj"}, "rank_pattern": {"o_proj": 4}}},
    ],
)
def test_what_is_written_loads_again_as_the_same(given: dict[str, Any], write: Callable[..., Path]) -> None:
    config = load_config(with_train(**given))
    assert load_config(config.to_dict()) == config
    assert load_config(write(dump_yaml(config))) == config
    assert load_config(config) == config
    assert load_config(config).origins == config.origins


def test_each_value_has_its_origin(write: Callable[..., Path]) -> None:
    path = write("data: {train: helpdesk}\ntraining_config: {evaluation_strategy: epoch, seed: 1}\n")
    config = load_config(path, ["training_config.seed=2", "model.torch_dtype=float32", "data.train.limit=5"])
    rows = {key: (value, origin) for key, value, origin in explain(config)}
    assert rows["training_config.seed"] == (2, "command line")
    assert rows["training_config.eval_strategy"] == ("epoch", str(path))
    assert rows["training_config.learning_rate"] == ("auto", "default")
    assert rows["model.dtype"] == ("float32", "command line")
    assert rows["data.train"] == ({"path": "helpdesk", "limit": 5}, "command line")
    assert set(rows) == set(config.origins)


def test_a_config_takes_further_overrides() -> None:
    config = load_config(load_config(with_train(), ["peft_config.r=4"]), ["peft_config.lora_alpha=8"])
    assert (config.peft_config["r"], config.peft_config["lora_alpha"]) == (4, 8)
    assert config.origins["peft_config.r"] == "command line"


def test_the_folder_of_a_run_is_read(write: Callable[..., Path], tmp_path: Path) -> None:
    write("data: {train: helpdesk}\npeft_config: {r: 3}\n", "config.yaml")
    assert load_config(tmp_path).peft_config["r"] == 3


def test_a_token_of_the_hub_is_neither_written_nor_shown() -> None:
    config = load_config(with_train(training_config={"hub_token": "hf_secret"}))
    assert config.training_config["hub_token"] == "hf_secret"
    assert "hf_secret" not in dump_yaml(config)
    assert "hf_secret" not in str(explain(config))


# --- values that YAML or Python write in another way -----------------------------------------------------


@pytest.mark.parametrize(
    ("section", "text", "expected"),
    [
        ("training_config", "learning_rate: 5e-6", 5e-6),
        ("training_config", "learning_rate: 1E-4", 1e-4),
        ("training_config", "max_steps: 1e2", 100),
        ("training_config", "logging_steps: 5.0", 5),
        ("training_config", "save_steps: 0.25", 0.25),
        ("training_config", "eval_strategy: no", "no"),
        ("training_config", "save_total_limit: null", None),
        ("training_config", "max_steps: -1", -1),
        ("training_config", "warmup_steps: 0", 0),
        ("training_config", "debug: ''", ""),
        ("peft_config", "init_lora_weights: pissa_niter_16", "pissa_niter_16"),
        ("peft_config", "init_lora_weights: false", False),
        ("peft_config", "target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("peft_config", "alpha_pattern: {o_proj: 0.5}", {"o_proj": 0.5}),
        ("peft_config", "layer_replication: [[0, 4], [2, 5]]", [[0, 4], [2, 5]]),
        ("peft_config", "lora_alpha: 22.6", 22.6),
    ],
)
def test_values_are_read(section: str, text: str, expected: Any, write: Callable[..., Path]) -> None:
    config = load_config(write(f"data: {{train: helpdesk}}\n{section}: {{{text}}}\n"))
    value = getattr(config, section)[text.partition(":")[0]]
    assert value == expected
    assert type(value) is type(expected)


def test_the_model_section_of_the_cards_script_is_understood() -> None:
    import torch

    kwargs = {
        "use_cache": False,
        "trust_remote_code": True,
        "attn_implementation": "flash_attention_2",
        "torch_dtype": torch.bfloat16,
        "device_map": None,
    }
    config = load_config(with_train(model=kwargs))
    assert config.model.dtype == "bfloat16"
    assert config.model.attn_implementation == "flash_attention_2"
    assert len(config.notices) == 2
    assert re.search(r"model\.torch_dtype=torch\.bfloat16 is an older spelling: read as dtype", config.notices[0])
    assert "model.trust_remote_code=True runs code from the model's repository." in config.notices[1]


def test_other_attention_implementations_are_let_through() -> None:
    for name in ("kernels-community/flash-attn", "paged|sdpa", "philora"):
        assert load_config(with_train(model={"attn_implementation": name})).model.attn_implementation == name


# --- faults: files ---------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest(write: Callable[..., Path], tmp_path: Path) -> None:
    write("data: {train: helpdesk}", "clinic.yaml")
    missing = tmp_path / "clinik.yaml"
    assert fault_of(missing) == (
        f"{missing}: config={shorten(str(missing))} - expected an existing file. Did you mean 'clinic.yaml'?"
    )
    assert "expected an existing file. The folder" in fault_of(tmp_path / "nowhere" / "a.yaml")
    assert "expected a YAML file, or the folder of a run" in fault_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": the file is empty - expected a configuration with at least data.train. See `philora demo`."),
        ("# nothing\n", ": the file is empty - expected a configuration with at least data.train."),
        ("- a\n- b\n", ": the file=['a', 'b'] - expected a mapping with sections such as data and training_config."),
        (
            "data:\n  train: [a\n",
            ":3:1: while parsing a flow sequence, expected ',' or ']', but got '<stream end>' - expected",
        ),
        ("data: {train: a}\n  x: 1\n", ":2:3: "),
        ("a: !!python/object/apply:os.system [ls]\n", ":1:4: could not determine a constructor for the tag"),
        ("a: b\x07c\n", ":1: special characters are not allowed - expected YAML. Remove what is not text."),
        ("data:\n  train: caf\xe9\n".encode("latin-1"), ":2: encoding=b'\\xe9' - expected UTF-8 text. Save the file"),
        ("a: 1\n---\nb: 2\n", "expected a single document in the stream"),
    ],
)
def test_what_is_no_configuration_file(content: str | bytes, message: str, write: Callable[..., Path]) -> None:
    path = write(content)
    text = fault_of(path)
    assert text.startswith(str(path))
    assert message in text


def test_utf8_with_and_without_a_mark_is_read(write: Callable[..., Path]) -> None:
    text = "data: {train: helpdesk}\ntraining_config: {run_name: Пример}\n"
    for content in (text.encode(), b"\xef\xbb\xbf" + text.encode()):
        assert load_config(write(content)).training_config["run_name"] == "Пример"
        assert "Пример" in dump_yaml(load_config(write(content)))


def test_a_key_that_stands_twice(write: Callable[..., Path]) -> None:
    path = write("data: {train: helpdesk}\npeft_config:\n  r: 8\n  lora_alpha: 8\n  r: 16\n")
    assert fault_of(path) == (
        f"{path}:5: peft_config.r is given twice, first in line 3 - expected each key once. Remove one of the two."
    )


def test_anchors_and_merges_are_read(write: Callable[..., Path]) -> None:
    text = "x-base: &b {seed: 3}\ndata: {train: helpdesk}\ntraining_config: {<<: *b, max_length: 64}\n"
    assert fault_of(write(text)).startswith(f"{write(text)}:1: x-base=")
    config = load_config(write("data: {train: helpdesk, eval: &e 0.2}\ntraining_config: {eval_delay: *e}\n"))
    assert config.training_config["eval_delay"] == 0.2


# --- faults: values --------------------------------------------------------------------------------------

FINITE = "expected a finite number"
VALUES = [
    ("training_config.learning_rate", "automatic", f"{FINITE} above 0 or auto"),
    ("training_config.learning_rate", ".nan", f"{FINITE} above 0"),
    ("training_config.learning_rate", ".inf", f"{FINITE} above 0"),
    ("training_config.learning_rate", "0", f"{FINITE} above 0"),
    ("training_config.learning_rate", "1" + "0" * 400, f"{FINITE} above 0"),
    ("training_config.learning_rate", "-1e-4", f"{FINITE} above 0"),
    ("training_config.learning_rate", "true", f"{FINITE} above 0"),
    ("training_config.learning_rate", "fast", f"{FINITE} above 0"),
    ("training_config.learning_rate", "'0.1'", f"{FINITE} above 0 or auto. Write the number without quotes."),
    ("training_config.num_train_epochs", "0", f"{FINITE} above 0"),
    ("training_config.max_steps", "0", "expected a whole number of at least 1, or -1 for no limit"),
    ("training_config.max_steps", "1.5", "expected a whole number of at least 1, or -1 for no limit"),
    ("training_config.per_device_train_batch_size", "0", "expected a whole number of at least 1 or auto"),
    ("training_config.per_device_train_batch_size", "atuo", "at least 1 or auto. Did you mean 'auto'?"),
    ("training_config.per_device_eval_batch_size", "-2", "expected a whole number of at least 1 or auto"),
    ("training_config.gradient_accumulation_steps", "0", "expected a whole number of at least 1"),
    ("training_config.tokens_per_step", "0", "expected a whole number of at least 1, auto or null"),
    ("training_config.gradient_checkpointing", "1", "expected true or false, elementwise or auto"),
    ("training_config.gradient_checkpointing", "full", "expected true or false, elementwise or auto"),
    ("training_config.gradient_checkpointing", "'true'", "elementwise or auto. Write true or false without quotes."),
    ("training_config.bf16", "yes please", "expected true or false, auto or null"),
    ("training_config.packing", "auto", "expected true or false"),
    ("training_config.logging_steps", "0", "expected a whole number of steps of at least 1, or a fraction of the run"),
    ("training_config.eval_steps", "-1", "or a fraction of the run above 0 and below 1 or null"),
    ("training_config.save_steps", "2.5", "expected a whole number of steps of at least 1, or a fraction of the run"),
    ("training_config.save_total_limit", "0", "expected a whole number of at least 1 or null"),
    ("training_config.early_stopping_patience", "0", "expected a whole number of at least 1 or null"),
    ("training_config.max_length", "7", "expected a whole number of at least 8 or null"),
    ("training_config.warmup_steps", "-1", "expected a fraction of the run of at least 0 and below 1, or a whole"),
    ("training_config.warmup_steps", "1.5", "expected a fraction of the run of at least 0 and below 1, or a whole"),
    ("training_config.weight_decay", "-0.1", f"{FINITE} of at least 0"),
    ("training_config.max_grad_norm", "-1", f"{FINITE} of at least 0"),
    ("training_config.adam_beta1", "1", f"{FINITE} of at least 0 and below 1"),
    ("training_config.adam_epsilon", "0", f"{FINITE} above 0"),
    ("training_config.neftune_noise_alpha", "0", f"{FINITE} above 0 or null"),
    ("training_config.seed", "-1", "expected a whole number of at least 0"),
    ("training_config.dataloader_num_workers", "-1", "expected a whole number of at least 0"),
    ("training_config.lr_scheduler_type", "cosin", "warmup_stable_decay, greedy. Did you mean 'cosine'?"),
    ("training_config.optim", "adamw", "expected one of adamw_torch, adamw_torch_fused"),
    ("training_config.eval_strategy", "step", "expected one of no, steps, epoch. Did you mean 'steps'?"),
    ("training_config.save_strategy", "always", "expected one of no, steps, epoch, best"),
    ("training_config.logging_strategy", "epochs", "expected one of no, steps, epoch. Did you mean 'epoch'?"),
    ("training_config.log_level", "verbose", "expected one of detail, debug, info, warning, error, critical, passive"),
    ("training_config.packing_strategy", "bdf", "expected one of bfd, bfd_split, wrapped. Did you mean 'bfd'?"),
    ("training_config.hub_strategy", "ends", "expected one of end, every_save"),
    ("training_config.lr_scheduler_kwargs", "[1]", "expected a mapping, text or null"),
    ("training_config.report_to", "3", "expected text, a list (text) or null"),
    ("training_config.output_dir", "null", "expected text"),
    ("training_config.run_name", "None", "expected text or null. YAML writes null, not None."),
    ("peft_config.r", "0", "expected a whole number of at least 1"),
    ("peft_config.r", "-4", "expected a whole number of at least 1"),
    ("peft_config.r", "3.5", "expected a whole number of at least 1"),
    ("peft_config.r", "true", "expected a whole number of at least 1"),
    ("peft_config.r", "'16'", "expected a whole number of at least 1. Write the number without quotes."),
    ("peft_config.lora_alpha", "0", f"{FINITE} above 0"),
    ("peft_config.lora_dropout", "1", f"{FINITE} of at least 0 and below 1"),
    ("peft_config.lora_dropout", "-0.1", f"{FINITE} of at least 0 and below 1"),
    ("peft_config.bias", "lora-only", "expected one of none, all, lora_only. Did you mean 'lora_only'?"),
    ("peft_config.rank_pattern", "{o_proj: 0}", "expected a mapping of names to a whole number of at least 1 or null"),
    ("peft_config.alpha_pattern", "{o_proj: 0}", "expected a mapping of names to a finite number above 0 or null"),
    ("peft_config.task_type", "SEQ_CLS", "expected CAUSAL_LM"),
    ("peft_config.task_type", "null", "expected CAUSAL_LM"),
    ("peft_config.task_type", "CAUSAL", "expected CAUSAL_LM"),
    ("peft_config.peft_type", "LOHA", "expected one of LORA or null"),
    ("peft_config.inference_mode", "true", "expected false"),
    ("peft_config.target_modules", "[]", "expected at least one module. Use all-linear for every linear layer"),
    ("peft_config.modules_to_save", "lm_head", "expected a list (text) or null"),
    ("peft_config.modules_to_save", "None", "expected a list (text) or null. YAML writes null, not None."),
    ("peft_config.init_lora_weights", "pisa", "loftq, lora_ga, orthogonal or mica. Did you mean 'pissa'?"),
    ("peft_config.init_lora_weights", "loftq", "expected loftq_config beside 'loftq'. For example loftq_config:"),
    ("peft_config.init_lora_weights", "eva", "expected an initialisation that needs no pass over data beforehand"),
    ("peft_config.init_lora_weights", "corda", "Use true or pissa, or initialise in Python and train with SFTTrainer"),
    ("peft_config.init_lora_weights", "lora_ga", "expected an initialisation that needs no pass over data"),
    ("peft_config.use_dora", "maybe", "expected true or false"),
    (
        "peft_config.eva_config",
        "{rhoo: 2}",
        "peft_config.eva_config.rhoo=2 - expected a key of EvaConfig. Did you mean",
    ),
    ("peft_config.eva_config", "{rho: x}", "peft_config.eva_config.rho='x' - expected a finite number"),
    ("peft_config.layers_to_transform", "[1, 2]", "expected null, because target_modules='all-linear' is one text."),
    ("model.dtype", "bf16", "expected one of auto, float32, bfloat16, float16. Did you mean 'bfloat16'?"),
    ("model.attn_implementation", "flash_attention2", "another implementation. Did you mean 'flash_attention_2'?"),
    ("model.quantization", "nf8", "expected one of none, nf4, int8 or a mapping of BitsAndBytesConfig's keys. Did you"),
    ("model.quantization", "{load_in_4bits: true}", "model.quantization.load_in_4bits=True - expected a key of Bits"),
    ("model.quantization", "{load_in_4bit: 4}", "model.quantization.load_in_4bit=4 - expected true or false"),
    ("model.quantization", "{load_in_4bit: true, load_in_8bit: true}", "expected only one of load_in_4bit and load_in"),
    ("model.quantization", "{bnb_4bit_quant_type: nf4}", "expected load_in_4bit: true or load_in_8bit: true in it"),
    ("model.name_or_path", "./no/model", "expected an existing folder or a hub id"),
    ("model.adapter", "/no/adapter", "expected an existing folder or a hub id. The folder '/no' does not exist."),
    ("model.use_cache", "0", "expected true or false"),
    ("tokenizer.padding_side", "rigth", "expected one of left, right or null. Did you mean 'right'?"),
    ("tokenizer.model_max_length", "4", "expected a whole number of at least 8 or null"),
    ("data.format", "chatml", "expected one of auto, messages, sharegpt, alpaca, prompt_completion, text"),
    ("data.overlong", "cut", "expected one of truncate, drop"),
    ("data.num_proc", "0", "expected a whole number of at least 1 or null"),
    (
        "data.eval",
        "0",
        "expected the same as data.train, a fraction of it above 0 and below 1, a number of rows, or null",
    ),
    ("data.eval", "1.5", "expected the same as data.train, a fraction of it above 0 and below 1, a number of rows"),
    ("data.eval", "true", "expected the same as data.train, a fraction of it above 0 and below 1, a number of rows"),
    ("evaluation.generate", "-1", "expected a whole number of at least 0"),
    ("evaluation.max_new_tokens", "0", "expected a whole number of at least 1"),
    ("evaluation.batch_size", "0", "expected a whole number of at least 1"),
]


@pytest.mark.parametrize(("key", "value", "expected"), VALUES, ids=lambda each: str(each)[:40])
def test_a_value_out_of_bounds(key: str, value: str, expected: str, write: Callable[..., Path]) -> None:
    section, _, name = key.partition(".")
    data = "" if section == "data" else "data: {train: helpdesk}\n"
    train = "train: helpdesk, " if section == "data" else ""
    path = write(f"{data}\n{section}: {{{train}{name}: {value}}}\n")
    text = fault_of(path)
    assert text.startswith(f"{path}:{3 if data else 2}: {key}")
    assert expected in text
    assert not text.endswith("?.")
    # The same value on the command line has the same fault there.
    over = fault_of(with_train(), [f"{key}={value}"])
    assert over.startswith(f"command line: {key}")
    assert expected in over


def test_all_faults_are_reported_at_once(write: Callable[..., Path]) -> None:
    path = write(
        "model: {name_or_pat: x}\n"
        "learning_rate: 5\n"
        "data: {train: ./nothing.jsonl}\n"
        "training_config:\n"
        "  learning_rate: 0\n"
        "  lr_scheduler_typ: cosine\n"
        "  r: 4\n"
        "peft_config: {r: 0}\n"
        "tokeniser: {}\n"
    )
    faults = faults_of(path, ["peft_config.lora_alpha=0", "training_config.seed"])
    where = [each.split(": ")[0] for each in faults]
    assert sorted(where) == sorted([*(f"{path}:{line}" for line in (1, 2, 3, 5, 6, 7, 8, 9)), *["command line"] * 2])
    text = "\n".join(faults)
    for part in (
        "model.name_or_pat='x' - expected one of name_or_path, adapter,",
        "learning_rate=5 - expected one of model, tokenizer, data, evaluation, training_config, peft_config. It "
        "belongs in training_config: write training_config.learning_rate.",
        "lr_scheduler_typ='cosine' - expected a key of trl.SFTConfig. Did you mean 'lr_scheduler_type'?",
        "training_config.r=4 - expected a key of trl.SFTConfig. It belongs in peft_config: write peft_config.r.",
        "tokeniser={} - expected one of model, tokenizer, data, evaluation, training_config, peft_config. Did you mean "
        "'tokenizer'?",
        "override='training_config.seed' - expected KEY=VALUE. For example training_config.learning_rate=1e-4.",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "config: data.train is missing - expected a file, a folder, a hub id,"),
        ({"data": None}, "config: data.train is missing"),
        ({"data": "a.jsonl"}, "config: data='a.jsonl' - expected a mapping. Write data: {train: ...}."),
        (with_train(model="nano"), "config: model='nano' - expected a mapping. Write model: {name_or_path: ...}."),
        (with_train(peft_config=[1]), "config: peft_config=[1] - expected a mapping. Write peft_config: {key: ...}."),
        ({"data": {"train": []}}, "config: data.train=[] - expected a file, a folder, a hub id"),
        ({"data": {"train": 3}}, "config: data.train=3 - expected a file, a folder, a hub id"),
        ({"data": {"train": ["a/b", 3]}}, "config: data.train[1]=3 - expected a path, or a mapping with a path"),
        ({"data": {"train": {"split": "x"}}}, "config: data.train={'split': 'x'} - expected a path in it. Add path:"),
        (with_train(**{"1": 2}), "config: 1=2 - expected one of model,"),
        ({"data": {"train": {"path": "a/b", "limt": 1}}}, "data.train.limt=1 - expected one of path, subset, split,"),
        (
            {"data": {"train": {"path": "a/b", "limit": 0}}},
            "data.train.limit=0 - expected a whole number of at least 1",
        ),
        ({"data": {"train": {"path": "a/b", "weight": 0}}}, "data.train.weight=0 - expected a finite number above 0"),
        ({"data": {"train": {"path": "a/b", "format": "x"}}}, "data.train.format='x' - expected one of auto, messages"),
        (
            {"data": {"train": {"path": "a/b", "columns": {"user": "{q", "assistant": "{a}"}}}},
            "data.train.columns.user='{q' - expected a template such as '{instruction}'. Expected '}' before end of "
            "string; a brace that is meant as text is doubled: {{ or }}.",
        ),
        (
            {"data": {"train": {"path": "a/b", "columns": {"user": "{}", "assistant": "{a}"}}}},
            "data.train.columns.user='{}' - expected a template such as '{instruction}'. Write a column's name between",
        ),
        (
            {"data": {"train": {"path": "a/b", "columns": {"usr": "{q}", "user": "{q}", "assistant": "{a}"}}}},
            "data.train.columns.usr='{q}' - expected one of system, user, assistant, prompt, completion, text",
        ),
        (
            {"data": {"train": {"path": "a/b", "columns": {"user": "{q}"}}}},
            "expected user and assistant, prompt and completion, text alone, messages (with or without system), or",
        ),
    ],
)
def test_wrong_shapes(given: Any, message: str) -> None:
    assert message in fault_of(given)


def test_keys_that_yaml_reads_as_something_else(write: Callable[..., Path]) -> None:
    assert "True=1 - expected one of model" in fault_of(write("data: {train: helpdesk}\non: 1\n"))


# --- data paths ------------------------------------------------------------------------------------------


def test_a_local_file_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load_config({"data": {"train": "chats.jsonl"}}).data.train[0].path == "chats.jsonl"
    assert load_config({"data": {"train": Path("chats.jsonl")}}).data.train[0].path == "chats.jsonl"
    assert fault_of({"data": {"train": "chat.jsonl"}}) == (
        "config: data.train='chat.jsonl' - expected an existing file or folder, or a hub id. "
        "Did you mean 'chats.jsonl'?"
    )
    for path in ("./x", "/no/x", "~/no-such-x", "a/b/c", "sets/"):
        assert f"data.train={path!r} - expected an existing file" in fault_of({"data": {"train": path}})
    assert f"Relative paths start at {tmp_path}." in fault_of({"data": {"train": "zzz.csv"}})


@pytest.mark.parametrize("path", ["HuggingFaceH4/ultrachat_200k", "squad", "hf://datasets/a/b.jsonl", "data/*.jsonl"])
def test_what_may_be_on_the_hub_is_left_to_the_reader(path: str) -> None:
    assert load_config({"data": {"train": path}}).data.train[0].path == path


def test_a_path_is_looked_for_beside_the_file_too(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    config = load_config(write("data: {train: chats.jsonl, eval: {path: chats.jsonl, limit: 2}}"))
    assert config.data.train[0].path == str(tmp_path / "chats.jsonl")
    assert isinstance(config.data.eval, tuple)
    assert config.data.eval[0] == SourceConfig(str(tmp_path / "chats.jsonl"), limit=2)


def test_the_line_of_a_path_in_a_list(write: Callable[..., Path]) -> None:
    path = write("data:\n  train:\n    - a/b\n    - path: ./none.csv\n      weight: 2\n    - ./none.txt\n")
    one, two = faults_of(path)
    assert one.startswith(f"{path}:4: data.train[1].path='./none.csv' - expected an existing file")
    assert two.startswith(f"{path}:6: data.train[2]='./none.txt' - expected an existing file")


# --- what no single key shows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "training", "message"),
    [
        ({"eval": None}, {"eval_strategy": "epoch"}, "eval_strategy='epoch' - expected no, because data.eval is null."),
        (
            {},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
            "load_best_model_at_end=True - expected eval_strategy='steps' and save_strategy='epoch' to be equal.",
        ),
        (
            {},
            {"load_best_model_at_end": True, "eval_steps": 20, "save_steps": 30},
            "save_steps=30 - expected a multiple of eval_steps=20, for load_best_model_at_end.",
        ),
        (
            {},
            {"load_best_model_at_end": True, "eval_steps": 0.1, "save_steps": 30},
            "save_steps=30 - expected a multiple of eval_steps=0.1, for load_best_model_at_end.",
        ),
        (
            {},
            {"load_best_model_at_end": True, "eval_strategy": "no"},
            "load_best_model_at_end=True - expected false, because eval_strategy is no.",
        ),
        (
            {"eval": None},
            {"early_stopping_patience": 2},
            "early_stopping_patience=2 - expected null, because eval_strategy is no.",
        ),
        (
            {},
            {"early_stopping_patience": 2, "load_best_model_at_end": False},
            "early_stopping_patience=2 - expected load_best_model_at_end: true beside it, or a metric_for_best_model.",
        ),
        (
            {"eval": None},
            {"save_strategy": "best"},
            "save_strategy='best' - expected evaluation in training for 'best'.",
        ),
        (
            {"eval": None},
            {"lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type='reduce_lr_on_plateau' - expected evaluation in training for 'reduce_lr_on_plateau'.",
        ),
        ({}, {"fp16": True, "bf16": True}, "fp16=True - expected false, because bf16 is true. Choose one of the two."),
        ({}, {"max_length": None}, "max_length=None - expected a number, because packing fills rows of that length."),
        (
            {},
            {"dataloader_prefetch_factor": 2},
            "dataloader_prefetch_factor=2 - expected null, because dataloader_num_workers is 0.",
        ),
    ],
)
def test_keys_that_contradict_each_other(data: dict[str, Any], training: dict[str, Any], message: str) -> None:
    assert f"config: training_config.{message}" in fault_of(with_train(data=data, training_config=training))


def test_defaults_follow_what_is_given() -> None:
    def training(data: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        return load_config(with_train(data=data or {}, training_config=given)).training_config

    assert training()["eval_strategy"] == "steps"
    assert training({"eval": None})["eval_strategy"] == "no"
    assert training(do_eval=False)["eval_strategy"] == "no"
    assert training(fp16=True)["bf16"] is False
    assert training(load_best_model_at_end=True, eval_strategy="epoch")["save_strategy"] == "epoch"
    assert training(load_best_model_at_end=True, save_steps=50)["eval_steps"] == 50
    assert training(early_stopping_patience=3)["load_best_model_at_end"] is True
    assert training(per_device_train_batch_size=4)["tokens_per_step"] is None
    assert training(gradient_accumulation_steps=4)["tokens_per_step"] is None
    assert training(per_device_train_batch_size="auto")["tokens_per_step"] == "auto"
    assert training(max_length=None, packing=False)["max_length"] is None


def test_two_ways_to_give_the_step_size_are_noticed() -> None:
    given = {"tokens_per_step": 4096, "gradient_accumulation_steps": 2}
    (notice,) = load_config(with_train(training_config=given)).notices
    assert notice == (
        "config: training_config.tokens_per_step and gradient_accumulation_steps are both given: "
        "gradient_accumulation_steps applies."
    )


# --- overrides -------------------------------------------------------------------------------------------


def test_overrides_win_and_are_read_as_yaml(write: Callable[..., Path]) -> None:
    path = write("data: {train: helpdesk}\npeft_config: {r: 4}\ntraining_config: {evaluation_strategy: epoch}\n")
    config = load_config(
        path,
        [
            "peft_config.r=8",
            "peft_config.target_modules=[q_proj, v_proj]",
            "training_config.learning_rate=1e-5",
            "training_config.eval_strategy=steps",
            "training_config.run_name=a=b",
            "training_config.save_total_limit=",
            "training_config.gradient_checkpointing_kwargs.use_reentrant=true",
            "model.quantization.load_in_4bit=true",
            "model.quantization={load_in_8bit: true}",
        ],
    )
    assert config.peft_config["r"] == 8
    assert config.peft_config["target_modules"] == ["q_proj", "v_proj"]
    assert config.training_config["learning_rate"] == 1e-5
    assert config.training_config["eval_strategy"] == "steps"
    assert config.training_config["run_name"] == "a=b"
    assert config.training_config["save_total_limit"] is None
    assert config.training_config["gradient_checkpointing_kwargs"] == {"use_reentrant": True}
    assert config.model.quantization == {"load_in_8bit": True}
    assert len(config.notices) == 1


def test_an_older_spelling_in_an_override_replaces_todays_in_the_file() -> None:
    given = with_train(training_config={"eval_strategy": "epoch"})
    config = load_config(given, ["training_config.evaluation_strategy=steps"])
    assert config.training_config["eval_strategy"] == "steps"
    assert config.notices == (
        "command line: training_config.evaluation_strategy='steps' is an older spelling: read as "
        "eval_strategy='steps'.",
    )


def test_overrides_do_not_change_the_given_mapping() -> None:
    given = with_train(training_config={"seed": 1, "lr_scheduler_kwargs": {"num_cycles": 1}})
    load_config(given, ["training_config.seed=2", "training_config.lr_scheduler_kwargs.num_cycles=3"])
    assert given["training_config"] == {"seed": 1, "lr_scheduler_kwargs": {"num_cycles": 1}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peft_config.r", "command line: override='peft_config.r' - expected KEY=VALUE."),
        ("=3", "command line: override='=3' - expected KEY=VALUE."),
        ("peft_config.r=[1", "command line: peft_config.r='[1' - expected a YAML value."),
        ("learning_rate=1e-4", "learning_rate=0.0001 - expected one of model, tokenizer, data,"),
        ("learning_rate=1e-4", "It belongs in training_config: write training_config.learning_rate."),
        ("data.trian=x", "command line: data.trian='x' - expected one of train, eval, format,"),
        ("peft_config=3", "command line: peft_config=3 - expected a mapping."),
        (
            "peft_config.r.x=3",
            "command line: peft_config.r.x=3 - expected peft_config.r to be a mapping. Give the complete",
        ),
    ],
)
def test_wrong_overrides(override: str, message: str) -> None:
    given = with_train(peft_config={"r": 4})
    assert message in "\n".join(faults_of(given, [override]))


# --- older spellings -------------------------------------------------------------------------------------


def test_the_dicts_of_the_cards_script_load_as_published(write: Callable[..., Path]) -> None:
    path = write(yaml.safe_dump(with_train(training_config=S4_TRAINING, peft_config=S4_PEFT), sort_keys=False))
    config = load_config(path)
    for key, value in S4_TRAINING.items():
        if key not in ("overwrite_output_dir", "warmup_ratio"):
            assert config.training_config[key] == value
    assert config.training_config["warmup_steps"] == 0.2
    assert config.peft_config == S4_PEFT
    lines = path.read_text().splitlines()
    overwrite, warmup = (lines.index(each) + 1 for each in ("  overwrite_output_dir: true", "  warmup_ratio: 0.2"))
    assert config.notices == (
        f"{path}:{overwrite}: training_config.overwrite_output_dir=True is left out: a run is never overwritten: "
        "continue it with --resume, or give another output_dir.",
        f"{path}:{warmup}: training_config.warmup_ratio=0.2 is an older spelling: read as warmup_steps=0.2.",
    )


def test_the_translated_dicts_of_the_card_build_todays_classes(libraries: tuple[type, type], tmp_path: Path) -> None:
    arguments, notices = translate_training_arguments(S4_TRAINING | {"output_dir": str(tmp_path), "use_cpu": True})
    assert len(notices) == 2
    made = libraries[0](**arguments)
    assert made.get_warmup_steps(100) == 20
    libraries[1](**S4_PEFT)


@pytest.mark.parametrize(
    ("given", "today", "notice"),
    [
        ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}, "read as eval_strategy='steps'."),
        (
            {"max_seq_length": 512},
            {"max_length": 512},
            "max_seq_length=512 is an older spelling: read as max_length=512",
        ),
        ({"no_cuda": True}, {"use_cpu": True}, "read as use_cpu=True."),
        ({"push_to_hub_token": "t"}, {"hub_token": "t"}, "read as hub_token"),
        ({"use_liger": True}, {"use_liger_kernel": True}, "read as use_liger_kernel=True."),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}, "read as warmup_steps=0.1."),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}, "warmup_steps=0.1, a fraction of the run."),
        ({"warmup_ratio": 0.0, "warmup_steps": 9}, {"warmup_steps": 9}, "is left out: warmup_steps=9 holds."),
        ({"warmup_ratio": None}, {}, "warmup_ratio=None is an older spelling: left out."),
        ({"overwrite_output_dir": True}, {}, "overwrite_output_dir=True is left out: a run is never overwritten"),
        ({"logging_dir": "x"}, {}, "logging_dir='x' is left out: set the environment variable TENSORBOARD_LOGGING_DIR"),
        ({"half_precision_backend": "auto"}, {}, "is left out: torch's own mixed precision is the only one left."),
        ({"jit_mode_eval": False}, {}, "jit_mode_eval=False is left out: transformers no longer has it."),
        ({"include_tokens_per_second": True}, {}, "is left out: philora always reports tokens per second."),
        (
            {"group_by_length": True},
            {"train_sampling_strategy": "group_by_length"},
            "group_by_length=True is an older spelling: read as train_sampling_strategy='group_by_length'.",
        ),
        ({"group_by_length": False}, {}, "group_by_length=False is an older spelling of the default"),
        ({"adafactor": True}, {"optim": "adafactor"}, "read as optim='adafactor'."),
        ({"include_inputs_for_metrics": True}, {"include_for_metrics": ["inputs"]}, "read as include_for_metrics="),
        (
            {"packing_strategy": "bfd-requeue"},
            {"packing_strategy": "bfd_split"},
            "read as packing_strategy='bfd_split'.",
        ),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}, "read as optim='adamw_torch'."),
        (
            {"model_init_kwargs": {"torch_dtype": "bfloat16", "use_cache": False}},
            {"model_init_kwargs": {"use_cache": False, "dtype": "bfloat16"}},
            "model_init_kwargs.torch_dtype='bfloat16' is an older spelling: read as dtype='bfloat16'.",
        ),
        ({"evaluation_strategy": "no", "eval_strategy": "no"}, {"eval_strategy": "no"}, "read as eval_strategy='no'."),
    ],
)
def test_older_spellings(given: dict[str, Any], today: dict[str, Any], notice: str) -> None:
    result, notices = translate_training_arguments(given)
    assert result == today
    assert len(notices) == 1
    assert notice in notices[0]
    # In a configuration the same notice carries its place.
    in_config = load_config(with_train(training_config=given)).notices
    assert [each for each in in_config if notices[0] in each] == [f"config: training_config.{notices[0]}"]


def test_no_older_spelling_is_a_key_of_the_installed_version() -> None:
    from philora.configuration import spellings

    older = {*spellings._RENAMED, *spellings._DROPPED, *spellings._CONVERTED, "warmup_ratio"}
    assert not older & set(schema.training_fields())
    assert set(spellings._RENAMED.values()) <= set(schema.training_fields())


def test_todays_spelling_passes_untouched() -> None:
    given = {"eval_strategy": "steps", "learning_rate": 1e-4, "no_such_key": 1, "gradient_checkpointing": False}
    assert translate_training_arguments(given) == (given, [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"evaluation_strategy": "steps", "eval_strategy": "epoch"},
            "evaluation_strategy='steps' - expected the same as eval_strategy='epoch'. Remove evaluation_strategy,",
        ),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio=0.1 - expected the same as warmup_steps=5."),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0 - expected a number of at least 0 and below 1."),
        ({"warmup_ratio": "x"}, "warmup_ratio='x' - expected a number of at least 0 and below 1."),
        (
            {"model_init_kwargs": {"torch_dtype": "float16", "dtype": "float32"}},
            "model_init_kwargs.torch_dtype='float16' - expected the same as dtype='float32'. Remove torch_dtype,",
        ),
    ],
)
def test_an_older_and_todays_spelling_that_differ(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"SFTConfig: {message}")):
        translate_training_arguments(given)
    assert f"config: training_config.{message}" in fault_of(with_train(training_config=given))


def test_the_model_in_two_spellings_that_differ() -> None:
    text = fault_of(with_train(model={"torch_dtype": "float16", "dtype": "float32"}))
    assert text == (
        "config: model.torch_dtype='float16' - expected the same as dtype='float32'. "
        "Remove torch_dtype, the older spelling of dtype."
    )


def test_both_names_of_recomputation() -> None:
    if "activation_checkpointing" not in schema.training_fields():
        pytest.skip("this transformers has one name")
    config = load_config(with_train(training_config={"activation_checkpointing": True}))
    assert config.training_config["gradient_checkpointing"] is True
    assert "activation_checkpointing" not in config.training_config
    assert config.notices == (
        "config: training_config.activation_checkpointing=True is read as gradient_checkpointing=True.",
    )
    both = {"activation_checkpointing": True, "gradient_checkpointing": False}
    assert "activation_checkpointing=True - expected the same as gradient_checkpointing=False. Remove one" in fault_of(
        with_train(training_config=both)
    )


def test_older_keywords_of_the_trainer() -> None:
    tokenizer = object()
    given = {
        "model": "m",
        "tokenizer": tokenizer,
        "max_seq_length": 2048,
        "dataset_text_field": "text",
        "packing": True,
        "eval_packing": False,
        "dataset_num_proc": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "neftune_noise_alpha": None,
        "num_of_sequences": 1024,
        "callbacks": [],
    }
    for_config, for_trainer, notices = translate_trainer_keywords(given)
    assert for_config == {
        "max_length": 2048,
        "dataset_text_field": "text",
        "packing": True,
        "eval_packing": False,
        "dataset_num_proc": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    assert for_trainer == {"model": "m", "processing_class": tokenizer, "callbacks": []}
    assert notices == [
        "tokenizer is an older keyword of SFTTrainer: read as processing_class.",
        "max_seq_length=2048 is an older keyword of SFTTrainer: read as SFTConfig(max_length=2048).",
        "dataset_text_field='text' is an older keyword of SFTTrainer: read as SFTConfig(dataset_text_field='text').",
        "packing=True is an older keyword of SFTTrainer: read as SFTConfig(packing=True).",
        "eval_packing=False is an older keyword of SFTTrainer: read as SFTConfig(eval_packing=False).",
        "dataset_num_proc=2 is an older keyword of SFTTrainer: read as SFTConfig(dataset_num_proc=2).",
        "dataset_kwargs={'skip_prepare_dataset': True} is an older keyword of SFTTrainer: read as "
        "SFTConfig(dataset_kwargs={'skip_prepare_dataset': True}).",
        "neftune_noise_alpha=None is an older keyword of SFTTrainer: left out.",
        "num_of_sequences=1024 is an older keyword of SFTTrainer and is left out: TRL no longer has it.",
    ]


def test_todays_keywords_of_the_trainer_pass_untouched() -> None:
    given = {"model": "m", "args": None, "processing_class": "t", "peft_config": None}
    assert translate_trainer_keywords(given) == ({}, given, [])


def test_a_tokenizer_under_two_names() -> None:
    same = object()
    assert translate_trainer_keywords({"tokenizer": same, "processing_class": same})[1] == {"processing_class": same}
    with pytest.raises(ConfigError, match=r"SFTTrainer: tokenizer='a' - expected the same as processing_class\."):
        translate_trainer_keywords({"processing_class": "b", "tokenizer": "a"})


def test_errors_are_value_errors_with_exit_code_two() -> None:
    with pytest.raises(ValueError, match=r"data\.train is missing") as caught:
        load_config({})
    assert isinstance(caught.value, ConfigError)
    assert caught.value.exit_code == 2


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_config(with_train())
    with pytest.raises(ConfigError):
        load_config({})
    assert list(tmp_path.iterdir()) == []


def test_a_config_is_frozen() -> None:
    config = load_config(with_train())
    assert isinstance(config, Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.source = "x"  # type: ignore[misc]
