"""Out of memory in a run: smaller parts, the same step, recorded and resumed; and an end in good order."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import philora
from philora.errors import RunError
from philora.files.checkpoint import newest_complete
from philora.kernels.memory import out_of_memory
from philora.models.loading import local_path
from philora.training.microbatches import halves, label_tokens, parts
from tests.conftest import make_phi3

LENGTHS = [23, 9, 31, 12, 40, 17, 5, 28]
IMPOSSIBLE = 1 << 60  # bytes


@pytest.fixture(scope="module", autouse=True)
def _less_garbage():
    """accelerate collects garbage around every training and after out-of-memory, over all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(local_path("nano"))


def documents(count=64):
    generator = torch.Generator().manual_seed(0)
    lengths = [LENGTHS[index % len(LENGTHS)] for index in range(count)]
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_list([{"input_ids": each, "labels": [-100] * 2 + each[2:]} for each in ids])


class Memory:
    """A memory for so many tokens at once, on a model: beyond that PyTorch's allocator is asked for the impossible."""

    def __init__(self, model, tokens, in_backward=False, first_call=1, training=True):
        self.tokens, self.in_backward, self.first_call, self.training = tokens, in_backward, first_call, training
        self.calls, self.seen = 0, []
        self.layer = model.model.layers[0]
        self.layer.register_forward_hook(self)

    def __call__(self, layer, _, output):
        hidden = output[0] if isinstance(output, tuple) else output
        if layer.training != self.training:
            return
        self.calls += 1
        size = hidden.shape[0] * hidden.shape[1]
        self.seen.append(size)
        if size <= self.tokens or self.calls < self.first_call:
            return
        if self.in_backward:
            hidden.register_hook(lambda grad: torch.empty(IMPOSSIBLE, dtype=torch.uint8))
        else:
            torch.empty(IMPOSSIBLE, dtype=torch.uint8)


def build(folder, tokenizer, model=None, dropout=0.2, **settings):
    """A trainer on a tiny model; with dropout, so that random states show."""
    args = philora.SFTConfig(
        str(folder),
        **{
            "max_steps": 4,
            "save_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "report_to": "none",
            "bf16": False,
            "seed": 3,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            **settings,
        },
    )
    model = make_phi3() if model is None else model
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    data = documents()
    return philora.SFTTrainer(
        model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer, peft_config=lora
    )


def trained(trainer, **options):
    """The adapter, and what was logged of each step."""
    trainer.train(**options)
    wanted = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    logged = [{name: each[name] for name in wanted} for each in trainer.state.log_history if "loss" in each]
    adapter = {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    return adapter, logged


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gap(one, other):
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)


# ------------------------------------------------------------------------------------------------------- parts


def collated(padding_free, count=8):
    rows = list(documents(count))
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("halvings", [0, 1, 2, 3, 6])
def test_parts_hold_every_document_once(padding_free, halvings):
    whole = collated(padding_free)
    pieces = parts(whole, halvings)
    assert len(pieces) <= min(2**halvings, 8)
    assert max(each["input_ids"].numel() for each in pieces) <= whole["input_ids"].numel() / min(2**halvings, 4) + 40
    assert halvings < 6 or len(pieces) == 8
    assert sum(label_tokens(each) for each in pieces) == label_tokens(whole)
    along = 1 if padding_free else 0
    for name in ("input_ids", "labels"):
        assert torch.equal(torch.cat([each[name] for each in pieces], along), whole[name])
    if padding_free:
        for each in pieces:
            ids = each["input_ids"][0].split(each["cu_seq_lens_q"].diff().tolist())
            again = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(
                [{"input_ids": part.tolist(), "labels": part.tolist()} for part in ids]
            )
            for name in again.keys() - {"labels"}:
                assert torch.equal(torch.as_tensor(each[name]), torch.as_tensor(again[name])), name
    else:
        assert all(each.keys() == whole.keys() for each in pieces)


def test_what_cannot_be_halved():
    one = collated(True, count=1)
    assert halves(one) is None
    assert parts(one, 3) == [one]
    assert halves(collated(False, count=1)) is None
    assert halves(collated(True) | {"pixel_values": torch.zeros(3, 4)}) is None
    assert halves(collated(False) | {"pixel_values": torch.zeros(3, 4)}) is None


def test_what_an_allocator_says_is_known():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(IMPOSSIBLE, dtype=torch.uint8)
    assert out_of_memory(refused.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(ValueError("out of memory"))


# ---------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory):
    """Of both layouts: a run with all the memory it wants."""
    found = {}
    for packing in (True, False):
        folder = tmp_path_factory.mktemp("undisturbed")
        settings = {"packing": packing, "max_length": 64, "save_strategy": "no"}
        found[packing] = trained(build(folder, tokenizer, dropout=0.0, **settings))
    return found


LAYOUT = {True: {"packing": True, "max_length": 64}, False: {"packing": False, "max_length": 64}}


@pytest.mark.parametrize(("packing", "in_backward"), [(True, False), (True, True), (False, True)])
def test_the_step_is_that_of_the_whole(undisturbed, tokenizer, tmp_path, caplog, packing, in_backward):
    """In the second micro-batch of the second step, when the first one's gradients are there already."""

    def run(folder, fault=False):
        model = make_phi3()
        memory = Memory(model, 130 if packing else 70, in_backward, first_call=4)  # rows go without their padding
        trainer = build(tmp_path / folder, tokenizer, model, dropout=0.0, save_strategy="no", **LAYOUT[packing])
        if fault:
            plain = trainer.model.zero_grad
            trainer.model.zero_grad = lambda: None if trainer._step is not None else plain()
        return trained(trainer), memory

    (adapter, logged), memory = run("run")
    assert "out of memory in step 2, with" in caplog.text
    assert "each batch is computed in 2 parts, accumulation 2 x 2" in caplog.text
    # without packing a later step, of longer rows, is divided once more
    assert max(memory.seen[4:] if packing else memory.seen[-1:]) <= memory.tokens
    whole_adapter, whole_logged = undisturbed[packing]
    # fp32 sums in another order, through the optimizer's division by small second moments
    assert gap(adapter, whole_adapter) < 1e-4
    for mine, theirs in zip(logged, whole_logged, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    if packing and in_backward:
        faulty, _ = run("faulty", fault=True)
        assert gap(faulty[0], whole_adapter) > 1e-2, "negative control: gradients of the failed attempt stay"


def with_halvings(trainer, count):
    trainer._micro_batch_parts.halvings = count
    return trainer


@pytest.mark.slow
def test_a_resumed_run_ends_in_the_same_bits(tokenizer, tmp_path):
    """Dropout's masks depend on the parts, so that a run with others would show."""
    model = make_phi3()
    Memory(model, 130, in_backward=True)
    run = tmp_path / "run"
    disturbed = trained(build(run, tokenizer, model, **LAYOUT[True]))
    from_the_start = trained(with_halvings(build(tmp_path / "parts", tokenizer, **LAYOUT[True]), 1))
    assert equal(disturbed[0], from_the_start[0]), "the step that failed began again in every respect"
    assert disturbed[1] == from_the_start[1]

    found = newest_complete(run)
    assert found.folder == run / "checkpoint-4"
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["MicroBatchParts"]["attributes"] == {"halvings": 1, "evaluation_halvings": 0}
    resumed = build(run, tokenizer, **LAYOUT[True])
    assert equal(trained(resumed, resume_from_checkpoint=str(run / "checkpoint-2"))[0], disturbed[0])
    assert resumed._micro_batch_parts.halvings == 1

    del state["stateful_callbacks"]["MicroBatchParts"]  # as an older version wrote it
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    forgetful = build(run, tokenizer, **LAYOUT[True])
    got = trained(forgetful, resume_from_checkpoint=str(run / "checkpoint-2"))[0]
    assert not equal(got, disturbed[0]), "negative control: the count is needed"


def test_the_end_in_good_order(tokenizer, tmp_path):
    model = make_phi3()
    memory = Memory(model, 20, first_call=17)  # in step 3: parts of one document of up to 40 tokens
    with pytest.raises(
        RunError, match=r"out of memory: in='step 3' - expected memory for \d+ tokens, which cannot be"
    ) as end:
        trained(
            build(
                tmp_path,
                tokenizer,
                model,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=8,
                **LAYOUT[False],
            )
        )
    assert "Set gradient_checkpointing: true, lower max_length, or quantise the base" in str(end.value)
    assert "checkpoint-2 is complete" in str(end.value)
    assert end.value.exit_code == 1
    assert newest_complete(tmp_path).folder == tmp_path / "checkpoint-2"
    assert memory.seen[-1] > 20


def test_other_errors_are_not_taken_for_it(tokenizer, tmp_path):
    trainer = build(tmp_path, tokenizer, save_strategy="no", **LAYOUT[True])

    def fail(*_):
        raise RuntimeError("shapes do not fit")

    hook = trainer.model.get_base_model().model.layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.train()
    hook.remove()
    assert trainer._step is None
    trainer.train()


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_goes_on_in_parts(tokenizer, tmp_path, caplog, packing):
    caplog.set_level(logging.WARNING)
    whole = build(tmp_path / "whole", tokenizer, per_device_eval_batch_size=8, **LAYOUT[packing])
    want = whole.evaluate()
    model = make_phi3()
    memory = Memory(model, 150, training=False)
    trainer = build(tmp_path / "parts", tokenizer, model, per_device_eval_batch_size=8, **LAYOUT[packing])
    got = trainer.evaluate()
    assert "out of memory in evaluation" in caplog.text
    assert trainer._micro_batch_parts.evaluation_halvings > 0
    assert trainer._micro_batch_parts.halvings == 0
    assert max(memory.seen[10:]) <= memory.tokens
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert got[name] == pytest.approx(want[name], rel=1e-5)
    if not packing:
        mine, theirs = trainer.predict(trainer.eval_dataset), whole.predict(whole.eval_dataset)
        assert (mine.label_ids == theirs.label_ids).all()
        assert abs(mine.predictions - theirs.predictions).max() < 1e-4


LIMITED = """
import json, resource, sys
from pathlib import Path
from transformers import TrainerCallback
import philora

class Limit(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        status = Path("/proc/self/status").read_text()
        now = int(next(line for line in status.splitlines() if line.startswith("VmData")).split()[1]) * 1024
        if sys.argv[2] != "none":
            resource.setrlimit(resource.RLIMIT_DATA, (now + int(sys.argv[2]), resource.RLIM_INFINITY))

philora.train(json.loads(sys.argv[1]), callbacks=[Limit()])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux")
def test_a_run_under_a_limit_of_memory(tmp_path):
    """The allocator refuses memory in a process of its own, whose step wants about 600 MiB."""
    losses = {}
    for limit in ("none", str(200 << 20)):
        settings = {"max_steps": 3, "max_length": 512, "per_device_train_batch_size": 16, "logging_steps": 1, "seed": 7}
        settings |= {"gradient_accumulation_steps": 1, "gradient_checkpointing": False, "save_steps": 2}
        config = {
            "model": {"name_or_path": "nano", "dtype": "float32"},
            "data": {"train": "helpdesk", "eval": None},
            "training_config": settings | {"output_dir": str(tmp_path / limit)},
            "peft_config": {"r": 4, "lora_dropout": 0.0},
        }
        command = [sys.executable, "-c", LIMITED, json.dumps(config), limit]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = (tmp_path / limit / "metrics.jsonl").read_text().splitlines()
        losses[limit] = [each["loss"] for each in map(json.loads, lines) if "loss" in each]
        told = (tmp_path / limit / "train.log").read_text().count("out of memory in step 1, with")
        assert bool(told) == (limit != "none")
    assert losses["none"] == pytest.approx(losses[str(200 << 20)], rel=1e-4)
