"""Files that a stranger made: adapters, configurations, models."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow
import pytest
from peft import LoraConfig
from pyarrow import parquet

import philora
from philora.configuration.config import load_config
from philora.configuration.sections import ModelConfig, SourceConfig, TokenizerConfig
from philora.dataset.read import resolve
from philora.errors import AdapterError, ConfigError, DataError, ModelError
from philora.files.checkpoint import indexed_files
from philora.models.loading import load_skeleton, load_tokenizer, local_path


@pytest.fixture
def adapter(phi3, tmp_path):
    """The folder of an adapter of slices, and how to change its configuration."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    folder = tmp_path / "adapter"
    philora.get_peft_model(phi3(), config).save_pretrained(str(folder))
    return folder


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"megatron_config": {}, "megatron_core": "json"}, r"megatron_config=\{\} - expected null"),
        ({"layer_replication": [[0, 10**9]]}, r"layer_replication=.* - expected at most 4096 layers"),
        (
            {"layers_to_transform": list(range(10**6))},
            r"layers_to_transform='a list of 1,000,000 numbers' - expected at most 4096",
        ),
        ({"init_lora_weights": "pissa_niter_1000000000"}, r"init_lora_weights=.* - expected at most 1000 iterations"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan - expected a finite number"),
        ({"alpha_pattern": {"qkv_proj": float("inf")}}, r"alpha_pattern=inf - expected a finite number"),
        ({"target_modules": r"(.*a)*(.*b)*x"}, r"target_modules=.* - expected a regular expression without"),
        ({"target_modules": r".*.*.*.*.*proj"}, r"target_modules=.* - expected a regular expression without"),
        ({"rank_pattern": {"(x+x+)+y": 1}}, r"rank_pattern=.* - expected a regular expression without"),
        (
            {"alpha_pattern": {"qkv_proj": []}},
            r"adapter_config.json: content=.* - expected an adapter that PEFT can put on this model",
        ),
        ({"peft_type": None}, r"adapter_config.json: content=.* - expected an adapter that PEFT can put on this model"),
    ],
)
def test_an_adapters_configuration_is_harmless(phi3, adapter, values, message):
    change(adapter / "adapter_config.json", **values)
    model = phi3()
    before = dict(model.named_parameters())
    with pytest.raises(AdapterError, match=message):
        philora.load_adapter(model, adapter)
    assert dict(model.named_parameters()).keys() == before.keys()


@pytest.mark.parametrize("pattern", [r".*\.layers\.(0|1)\..*proj", r"^(?!.*lm_head).*(q|v)_proj$", r"a\+\+[+*]+b"])
def test_patterns_that_people_write_are_taken(pattern):
    from philora.adapters.adapter_files import is_quick

    assert is_quick(pattern)


@pytest.mark.parametrize(
    "content",
    ["", "[" * 100_000, "null", '{"slices": {"x": {}}}', '{"slices": {"model.layers.0.self_attn.qkv_proj": {"names": '
     '["nothing"], "r": 2}}}', '{"slices": {"model.layers.0.self_attn.qkv_proj": {"names": ["q_proj"], "r": "x"}}}'],
    ids=range(6),
)  # fmt: skip
def test_a_torn_record_of_slices_is_refused(phi3, adapter, content):
    (adapter / "philora.json").write_text(content)
    model = phi3()
    with pytest.raises(AdapterError, match=r"philora.json: content=.* - expected slices of fused modules"):
        philora.load_adapter(model, adapter)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_an_adapter_is_refused_by_its_header(phi3, adapter):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    weights.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(AdapterError, match="expected a complete safetensors file"):
        philora.load_adapter(phi3(), adapter)
    header = json.loads(content[8 : 8 + length])
    name = next(each for each in header if each != "__metadata__")
    header[name] |= {"shape": [2**20, 2**11], "data_offsets": [0, 2**33]}
    header = {name: header[name]}
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + 2**33)  # 8 GiB that take no room on the disk
    with pytest.raises(AdapterError, match=r"=\(1048576, 2048\) - expected the shape"):
        philora.load_adapter(phi3(), adapter)


def bomb(depth):
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth + 1)]
    return "\n".join([*lines, "data: {train: helpdesk}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(12), "its aliases stand for more than 100,000 values"),
        ("data: &a {train: helpdesk, x: *a}", "an alias is inside the value that it repeats"),
        ("data: {train: !!python/object/apply:os.system [true]}", "could not determine a constructor"),
        ("data: {train: !!timestamp x}", "expected YAML"),
        ("data: {train: !!bool y}", "expected YAML"),
        ("[" * 5000, "nested more than 100 levels deep"),
        ("data: {train: " + "a/" * 3000 + "}", r"data.train='a/.* - expected an existing file or folder"),
        (
            "data: {train: helpdesk}\nmodel: {adapter: /" + "a" * 5000 + "}",
            "adapter='/a.* - expected an existing folder",
        ),
        ("# " + "x" * 2**20, r"bytes=1048578 - expected at most 1,048,576"),
    ],
    ids=range(9),
)
def test_yaml_that_grows_or_executes_is_refused(tmp_path, content, message):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_aliases_that_people_write_are_taken(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: &set helpdesk, eval: *set}\npeft_config: {r: 4}")
    assert load_config(path).peft_config["r"] == 4


def test_parquet_with_a_changed_byte_is_read_or_refused(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), path)
    content, refused = path.read_bytes(), 0
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            for _ in resolve(SourceConfig(str(path)), "train").open():
                pass
        except DataError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "missing.safetensors"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.safetensors").write_text("x")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match=r"weight_map=.* - expected an existing file in the same folder"):
        indexed_files(index)
    with pytest.raises(ModelError, match=r"weight_map="):
        load_skeleton(ModelConfig(str(folder)))


def test_an_index_of_weights_that_are_not_read_is_no_fault(phi3, tmp_path):
    """Whoever downloads only a model's safetensors has the index of its .bin files and none of those."""
    folder = tmp_path / "model"
    phi3().save_pretrained(folder)
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}})
    (folder / "pytorch_model.bin.index.json").write_text(index)
    load_skeleton(ModelConfig(str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weight_map='pytorch_model-00001-of-00002.bin' - expected an existing file"):
        load_skeleton(ModelConfig(str(folder)))


def test_no_archive_is_unpacked():
    """Names inside an archive could lead out of a folder; nothing here makes paths of them."""
    sources = {path: path.read_text(encoding="utf-8") for path in Path(philora.__file__).parent.rglob("*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        assert not re.search(r"\b(ZipFile|tarfile|unpack_archive|extractall)\b", text), path


# ---------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture
def nano_files(tmp_path):
    """A copy of the bundled model's folder that a test may damage."""
    return Path(shutil.copytree(local_path("nano"), tmp_path / "model"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**11 }}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{{ 'x'.ljust(10**12) }}",
    ],
)
def test_a_chat_template_that_takes_all_memory_is_refused(template, nano_files):
    (nano_files / "chat_template.jinja").write_text(template)
    with pytest.raises(ModelError, match=r"chat_template: rendering ordinary conversations takes more than 2 GiB"):
        load_tokenizer(ModelConfig(name_or_path=str(nano_files)), TokenizerConfig())


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% generation %}a{% endgeneration %}", "{{ a.b }}"]
)
def test_a_template_that_only_refuses_is_for_the_data_to_meet(template, nano_files):
    (nano_files / "chat_template.jinja").write_text(template)
    assert load_tokenizer(ModelConfig(name_or_path=str(nano_files)), TokenizerConfig()).chat_template == template


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}}, "unk_id"),
    ],
)
def test_a_tokenizer_that_panics_is_one_message(changes, said, nano_files):
    file = nano_files / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(
        ModelError, match=rf"name_or_path=.* - expected a folder with a tokenizer.*tokenizer.json: .*{said}"
    ):
        load_tokenizer(ModelConfig(name_or_path=str(nano_files)), TokenizerConfig())


@pytest.mark.slow
def test_a_million_stop_tokens_are_refused(nano_files):
    change(nano_files / "config.json", eos_token_id=[*range(10**6)])
    with pytest.raises(ModelError, match=r"eos_token_id='a list of 1,000,000 numbers' - expected at most 1000 tokens"):
        philora.preflight({"model": {"name_or_path": str(nano_files)}, "data": {"train": "helpdesk"}})
