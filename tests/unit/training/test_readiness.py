"""`philora check` on the published samples' own settings and data: each known defect of theirs gets a message."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file
from transformers import Phi3Config

from philora.configuration.config import load_config
from philora.errors import ModelError
from philora.families import find
from philora.models.loading import local_path
from philora.training.readiness import preflight

# The arguments of TrainingArguments and SFTTrainer and the keywords of from_pretrained, as published, by sample.
PUBLISHED = yaml.safe_load("""
S1: &S1
  model: {trust_remote_code: true, torch_dtype: auto}
  training_config: &S1_training
    evaluation_strategy: steps
    per_device_train_batch_size: 7
    gradient_accumulation_steps: 4
    gradient_checkpointing: true
    learning_rate: 1.0e-4
    fp16: false
    bf16: true
    max_steps: -1
    num_train_epochs: 3
    save_strategy: epoch
    logging_steps: 10
    output_dir: opus-samantha-phi-3-mini-4k
    optim: paged_adamw_32bit
    lr_scheduler_type: linear
    dataset_text_field: text
    max_seq_length: 128
S2:
  model: {torch_dtype: float16}
  training_config: {<<: *S1_training, fp16: true, bf16: false}
S3:
  model: {torch_dtype: bfloat16, trust_remote_code: true, attn_implementation: flash_attention_2}
  training_config: &S3_training
    evaluation_strategy: steps
    do_eval: true
    optim: adamw_torch
    per_device_train_batch_size: 8
    gradient_accumulation_steps: 4
    per_device_eval_batch_size: 8
    log_level: debug
    save_strategy: epoch
    logging_steps: 100
    learning_rate: 1.0e-4
    bf16: true
    eval_steps: 100
    num_train_epochs: 3
    warmup_ratio: 0.1
    lr_scheduler_type: linear
    report_to: wandb
    seed: 42
    max_seq_length: 512
    dataset_text_field: text
  peft_config: &S3_peft
    r: 16
    lora_alpha: 16
    lora_dropout: 0.05
    task_type: CAUSAL_LM
    target_modules: [k_proj, q_proj, v_proj, o_proj, gate_proj, down_proj, up_proj]
S4:
  model:
    {use_cache: false, trust_remote_code: true, attn_implementation: flash_attention_2, torch_dtype: bfloat16,
     device_map: null}
  tokenizer: {model_max_length: 2048, pad_token: <unk>, padding_side: right}
  training_config:
    bf16: true
    do_eval: false
    learning_rate: 5.0e-6
    log_level: info
    logging_steps: 20
    logging_strategy: steps
    lr_scheduler_type: cosine
    num_train_epochs: 1
    max_steps: -1
    output_dir: ./checkpoint_dir
    overwrite_output_dir: true
    per_device_eval_batch_size: 4
    per_device_train_batch_size: 4
    remove_unused_columns: true
    save_steps: 100
    save_total_limit: 1
    seed: 0
    gradient_checkpointing: true
    gradient_checkpointing_kwargs: {use_reentrant: false}
    gradient_accumulation_steps: 1
    warmup_ratio: 0.2
    max_seq_length: 2048
    dataset_text_field: text
    packing: true
  peft_config:
    r: 16
    lora_alpha: 32
    lora_dropout: 0.05
    bias: none
    task_type: CAUSAL_LM
    target_modules: all-linear
    modules_to_save: null
S5:
  model: {trust_remote_code: true, attn_implementation: flash_attention_2}
  training_config: {<<: *S3_training, optim: paged_adamw_8bit, per_device_train_batch_size: 4,
                    gradient_accumulation_steps: 8}
  peft_config: *S3_peft
""")
PLAIN = {"system": "system\n", "human": "\nuser\n", "gpt": "\nassistant\n"}  # the markup of S1 and S2
END_NUMBER = "4085"  # of <|endoftext|> in the tokenizer below, 32000 in Phi-3's


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shape of Phi-3-mini and a file without weights; its tokenizer pads with the end token."""
    folder = tmp_path_factory.mktemp("phi") / "phi-3-mini"
    shutil.copytree(local_path("nano"), folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    fact = find("microsoft/Phi-3-mini-4k-instruct")
    assert fact is not None
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "max_position_embeddings", "sliding_window")  # fmt: skip
    Phi3Config(
        **{name: getattr(fact, name) for name in names}, bos_token_id=1, eos_token_id=4085, pad_token_id=0
    ).save_pretrained(folder)
    save_file({}, folder / "model.safetensors")  # looked for, and its header read, before anything else
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    return folder


def text_of(turns: list[dict[str, str]]) -> str:
    return "".join(f"{PLAIN[each['from']]} {each['value']}\n" for each in turns)


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each sample hands to its trainer."""
    folder = tmp_path_factory.mktemp("data")
    chats = [
        [{"from": "human", "value": f"What is {n}?"}, {"from": "gpt", "value": f"It comes after {n - 1}."}]
        for n in range(1, 41)
    ]
    code = [
        {"instruction": f"Add {n}.", "input": "1", "output": f"print(1 + {n})", "prompt": f"### Instruction: Add {n}."}
        for n in range(40)
    ]
    marked = [
        {"text": f"<|user|>\n{human['value']}<|end|>\n<|assistant|>\n{gpt['value']}<|end|>\n<|endoftext|>"}
        for human, gpt in chats
    ]
    # S3 takes one split with a seed; S5 takes a second one without, so that its test rows were trained on.
    shuffled = random.Random(1234).sample(code, len(code))
    again = random.Random(5).sample(code, len(code))
    s3, s5 = ({"train": write(folder / f"{name}.jsonl", shuffled[4:]),
               "eval": write(folder / f"{name}-test.jsonl", test[:4])}
              for name, test in (("S3", shuffled), ("S5", again)))  # fmt: skip
    s1 = write(folder / "S1.jsonl", [{"text": f"{text_of(turns)}{END_NUMBER}"} for turns in chats])
    s2 = write(folder / "S2.jsonl", [{"text": f"{text_of(turns)}<|endoftext|>"} for turns in chats])
    s4 = write(folder / "S4.jsonl", marked)
    return {"S1": {"train": s1}, "S2": {"train": s2}, "S3": s3, "S4": {"train": s4}, "S5": s5}


NO_LORA = r"peft_config is not given\. Without one a script of TRL or transformers trains every weight of the model"
SLICES = (
    r"q_proj, k_proj, v_proj, .*are slices of .*qkv_proj.*: 29,884,416 parameters train\. "
    r"PEFT alone would silently adapt .*(o_proj and down_proj|down_proj and o_proj) only: 8,912,896\."
)
END_AS_TEXT = r"rows end in the number of a stop token, written as text: the model would learn to write digits"
TURNS_AS_TEXT = r"32 rows are plain text"
PAD = r"the model's tokenizer pads with <\|endoftext\|>, which is a stop token: <unk> is used instead"
REMOTE = r"model\.trust_remote_code=True .*breaks generation on today's transformers"
LEAK = r"rows of eval are also in train: its scores will be too good"
NO_EFFECT = r"dataset_text_field='text' has no effect: .* the loss is on the assistant's turns only"


def older(*names: str) -> list[str]:
    return [rf"(training_config|model)\.{name}=.*is an older spelling" for name in names]


DEFECTS = {
    "S1": [NO_LORA, END_AS_TEXT, TURNS_AS_TEXT, PAD, REMOTE, NO_EFFECT,
           *older("evaluation_strategy", "max_seq_length", "torch_dtype")],
    "S2": [NO_LORA, TURNS_AS_TEXT, PAD, *older("evaluation_strategy", "max_seq_length", "torch_dtype")],
    "S3": [SLICES, REMOTE, NO_EFFECT, *older("evaluation_strategy", "warmup_ratio", "max_seq_length", "torch_dtype")],
    "S4": [TURNS_AS_TEXT, REMOTE, NO_EFFECT, r"overwrite_output_dir=True is left out: a run is never overwritten",
           *older("warmup_ratio", "max_seq_length", "torch_dtype")],
    "S5": [SLICES, LEAK, REMOTE, NO_EFFECT, *older("evaluation_strategy", "warmup_ratio", "max_seq_length")],
}  # fmt: skip
CLEAN = {  # messages that a sample without the defect must not get
    "S1": [SLICES, LEAK],
    "S2": [END_AS_TEXT, REMOTE, SLICES],
    "S3": [NO_LORA, TURNS_AS_TEXT, END_AS_TEXT, LEAK],
    "S4": [NO_LORA, SLICES, END_AS_TEXT],
    "S5": [NO_LORA, TURNS_AS_TEXT, END_AS_TEXT],
}


def found(text: str, notices: Iterable[str]) -> bool:
    return any(re.search(text, each, re.DOTALL) for each in notices)


@pytest.fixture(scope="module")
def notices(phi: Path, data: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    found = {}
    for name, given in PUBLISHED.items():
        # Of a sample that asks for flash attention a CPU refuses just that.
        model = given["model"] | {"name_or_path": str(phi), "attn_implementation": "auto"}
        training = given["training_config"] | {"max_steps": 40}  # the few rows here would be warm-up alone
        found[name] = preflight({**given, "model": model, "training_config": training, "data": data[name]}).notices
    return found


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_of_a_published_sample_is_reported(notices, name):
    for text in DEFECTS[name]:
        assert found(text, notices[name]), (text, notices[name])
    for text in CLEAN[name]:
        assert not found(text, notices[name]), (text, notices[name])


def test_padding_with_the_end_token_is_refused_when_asked_for(phi, data):
    given = {"model": {"name_or_path": str(phi)}, "tokenizer": {"pad_token": "<|endoftext|>"}, "data": data["S2"]}
    with pytest.raises(ModelError, match=r"pad_token='<\|endoftext\|>' - expected a token .* padding is never learned"):
        preflight(given)


def test_the_command_line_shows_the_notices(phi, data, tmp_path, monkeypatch, capsys):
    from philora.cli import commands as cli

    path = tmp_path / "s1.yaml"
    given = PUBLISHED["S1"] | {"model": {"name_or_path": str(phi)}, "data": data["S1"]}
    path.write_text(yaml.safe_dump(given))
    monkeypatch.setattr("sys.argv", ["philora", "check", str(path)])
    cli.main()
    shown = " ".join(capsys.readouterr().out.split())
    for text in (NO_LORA, END_AS_TEXT, PAD):
        assert re.search(text, shown)


@pytest.mark.parametrize("key", ["assistant_only_loss", "completion_only_loss"])
def test_a_loss_on_the_prompt_is_not_promised(key):
    shown = load_config({"data": {"train": "helpdesk"}, "training_config": {key: False}}).notices
    assert found(rf"training_config\.{key}=False has no effect: .* the loss is on the assistant's turns only", shown)
    assert not load_config({"data": {"train": "helpdesk"}, "training_config": {key: True}}).notices


def test_answers_that_are_numbers_are_left_alone(phi, tmp_path):
    """A number at the end is part of the answer where it stands in some answers only, or is short."""
    records = [{"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": text}]}
               for text in (f"It is {END_NUMBER}", "It is 1", "It is 2", f"It is 9{END_NUMBER}")]  # fmt: skip
    path = write(tmp_path / "numbers.jsonl", records)
    shown = preflight({"model": {"name_or_path": str(phi)}, "data": {"train": path, "eval": None}}).notices
    assert not found(END_AS_TEXT, shown)


@pytest.mark.parametrize(
    "text",
    ["User guides are long.\nAnswer: none.", "The assistant\nuser reads.", "def user():\n    return assistant()"],
)
def test_prose_is_not_taken_for_turns(text):
    from philora.dataset.messages import Conversation

    assert not Conversation([{"role": "text", "content": text}]).has_turns_as_text


def test_a_script_without_lora_is_told(phi3, tmp_path, caplog):
    from datasets import Dataset
    from transformers import AutoTokenizer

    import philora

    with caplog.at_level("WARNING", logger="philora"):
        philora.SFTTrainer(
            phi3(),
            args=philora.SFTConfig(str(tmp_path), max_length=32, report_to="none", bf16=False),
            train_dataset=Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]),
            processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        )
    assert re.search(r"no peft_config is given: all [\d,]+ parameters train, without LoRA", caplog.text)
