"""The fast paths under every way people train: the numbers of the same run without them, and proof that they ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import philora
from philora.adapters.fast_layers import FastLinear
from philora.lora.functional import fused
from tests.fast_paths import (
    HAND,
    ROWS,
    STEPS,
    TRAINER,
    adapted,
    backwards,
    counted,
    gaps,
    train,
    train_by_trainer,
    used,
)
from tests.tolerances import GRADIENTS_FP32, LOSS_STEP_BF16, LOSS_STEP_FP32

REPOSITORY = Path(__file__).resolve().parents[3]

# Seen at 1 x ROWS forward passes a step: what each way has to reach, so that no layer falls back unseen.
LAYERS = 2
PASSES = STEPS * ROWS


def enough(counts, parts, passes=PASSES):
    """Whether every layer's part of every pass computed its gradient in the fast functions."""
    least = {"lora": 4 * LAYERS, "attention": LAYERS, "elementwise": LAYERS, "loss": 1}
    done = backwards(counts)
    return used(counts) == parts and all(done[part] >= least[part] * passes for part in parts)


def close(mine, plain):
    loss, gradient = gaps(mine, plain)
    return loss <= LOSS_STEP_FP32 and gradient <= GRADIENTS_FP32


def call_of(label_head):
    return {"fused_lm_head": True} if label_head else {}


def parts_of(label_head):
    return TRAINER if label_head else HAND


@pytest.fixture(scope="module")
def plain():
    """One process with the fast paths off, by whether the loss is the trainer's."""
    with fused(False), counted() as counts:
        found = {head: train(adapted(head), **call_of(head)) for head in (False, True)}
    assert not counts
    return found


def recomputing(model, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


# --------------------------------------------------------------------------------------------- a loop by hand


@pytest.mark.parametrize("label_head", [False, True], ids=["model's loss", "trainer's loss"])
@pytest.mark.parametrize("way", ["as it is", "not reentrant", "reentrant", "one pass a step"])
def test_by_hand(plain, way, label_head):
    model = adapted(label_head)
    if "reentrant" in way:
        recomputing(model, way == "reentrant")
    passes = 1 if way == "one pass a step" else ROWS
    with counted() as counts:
        mine = train(model, accumulation=passes, **call_of(label_head))
    assert enough(counts, parts_of(label_head), STEPS * passes), counts
    if "reentrant" in way:
        assert counts["lora", "forward"] == 2 * counts["lora", "backward"], "each layer is computed twice"
    assert close(mine, plain[label_head])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_draws_the_same_dropout(use_reentrant):
    """With the model's loss: the trainer's leaves out rows of the last layer, and draws for those that are left."""

    def run(seed, prepare):
        model = prepare(adapted(dropout=0.3))
        torch.manual_seed(seed)
        return train(model)

    want = run(0, lambda model: model)
    with counted() as counts:
        mine = run(0, lambda model: recomputing(model, use_reentrant))
    assert enough(counts, HAND)
    assert close(mine, want)
    assert not close(run(1, lambda model: model), want), "negative control"


@pytest.mark.parametrize(
    "label_head",
    [pytest.param(False, id="model's loss"), pytest.param(True, id="trainer's loss")],
)
@pytest.mark.slow
def test_compiled(plain, label_head):
    """Within a graph the plain forms are used; the graph breaks no more often than without philora."""
    from torch._dynamo.utils import counters

    def run(fast):
        torch._dynamo.reset()
        counters.clear()
        with fused(fast), counted() as counts:
            result = train(torch.compile(adapted(label_head), backend="aot_eager"), **call_of(label_head))
        assert not counts
        return result, sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]

    mine, breaks, graphs = run(True)
    assert close(mine, plain[label_head])
    assert (breaks, graphs) == run(False)[1:]


def test_a_planted_fault_shows(plain):
    model = adapted(True)
    layer = next(each for each in model.modules() if isinstance(each, FastLinear))
    layer.scaling["default"] *= 1.001
    assert not close(train(model, fused_lm_head=True), plain[True])


@pytest.mark.parametrize("part", ["one layer", "attention", "everything"])
def test_falling_back_shows(part):
    """`enough` is not met when a single layer computes in PEFT's forward, however equal its numbers."""
    model = adapted(True)
    if part == "one layer":
        layer = next(each for each in model.modules() if isinstance(each, FastLinear))
        layer.base_layer.register_forward_hook(lambda *_: None)
    elif part == "attention":
        model.get_base_model().set_attn_implementation("sdpa")
    with fused(part != "everything"), counted() as counts:
        train(model, fused_lm_head=True)
    assert not enough(counts, TRAINER)


# ---------------------------------------------------------------------------------------- philora.SFTTrainer


@pytest.fixture(scope="module")
def trained_plain(tmp_path_factory):
    """The trainer in one process with the fast paths off."""
    with fused(False), counted() as counts:
        found = train_by_trainer(str(tmp_path_factory.mktemp("plain")))
    assert not counts
    return found


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({}, ROWS),
        ({"gradient_checkpointing": True}, ROWS),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, ROWS),
        ({"accumulation": 2, "per_device_train_batch_size": 2}, 2),
    ],
    ids=["as it is", "not reentrant", "reentrant", "two rows a pass"],
)
def test_trainer(trained_plain, tmp_path, settings, passes):
    with counted() as counts:
        mine = train_by_trainer(str(tmp_path), **settings)
    assert enough(counts, TRAINER, STEPS * passes), counts
    assert close(mine, trained_plain)


@pytest.mark.slow
def test_trainer_compiled(trained_plain, tmp_path):
    with counted() as counts:
        mine = train_by_trainer(str(tmp_path), torch_compile=True, torch_compile_backend="aot_eager")
    assert not counts
    assert close(mine, trained_plain)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------- philora.train


def losses_of_a_run(folder, **changes):
    settings = {
        "model": {"name_or_path": "nano", "dtype": "float32"},
        "data": {"train": {"path": "helpdesk", "limit": 60}},
        "training_config": {
            "output_dir": str(folder),
            "max_steps": 2,
            "max_length": 256,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "learning_rate": 1e-3,
            **changes,
        },
        "peft_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    }
    result = philora.train(settings)
    state = json.loads((result.folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.slow
def test_run_from_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PHILORA_FUSED", "0")
    with counted() as counts:
        want = losses_of_a_run(tmp_path / "plain")
    assert not counts
    monkeypatch.delenv("PHILORA_FUSED")
    ways = {
        "fast": {},
        "recomputed": {"gradient_checkpointing": True},
        "one pass": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
    }
    for name, changes in ways.items():
        with counted() as counts:
            mine = losses_of_a_run(tmp_path / name, **changes)
        assert used(counts) == TRAINER, name
        assert max(abs(a - b) for a, b in zip(mine, want, strict=True)) <= LOSS_STEP_FP32, name


# ------------------------------------------------------------------------------------------- two processes

WAYS = (
    "ddp",
    "ddp-checkpointed",
    "fsdp2",
    "fsdp2-checkpointed",
    "fsdp2-accelerate",
    "fsdp2-recomputed",
    "fsdp2-leaves",
    "fsdp1",
    "fsdp1-peft",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes, started by torchrun, made of each way; once, however many workers run these tests."""
    folder = tmp_path_factory.getbasetemp()
    out = (folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "fast_distributed.pt"
    script = REPOSITORY / "tests" / "scripts" / "fast_distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join(each for each in (str(REPOSITORY), os.environ.get("PYTHONPATH", "")) if each)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PHILORA_FUSED": "1"}
    with FileLock(f"{out}.lock"):
        if not out.exists():
            ended = subprocess.run(
                [*command, str(out), *WAYS, "fsdp2-bf16", "trainer"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert ended.returncode == 0, ended.stderr[-3000:]
    return torch.load(out, weights_only=False)


def result_of(shared, way, label_head):
    found = shared["found"][way, label_head]
    assert isinstance(found, dict), found
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "label_head"),
    [
        pytest.param(way, label_head, id=f"{way}, {'trainer' if label_head else 'model'}'s loss")
        for label_head in (False, True)
        for way in WAYS
    ],
)
def test_two_processes_by_hand(shared, plain, way, label_head):
    """Losses and gradients of one process on the same rows; what is not fast is named."""
    found = result_of(shared, way, label_head)
    assert close((found["losses"], found["gradients"]), plain[label_head])
    assert found["parameters"] == {"DTensor" if way.startswith("fsdp2") else "Tensor"}
    parts = parts_of(label_head)
    if way in ("fsdp2-leaves", "fsdp1-peft"):
        parts = parts - {"lora"}  # with a notice
    assert enough(found["counts"], parts, PASSES // 2), found["counts"]


@pytest.mark.slow
@pytest.mark.parametrize("label_head", [False, True], ids=["model's loss", "trainer's loss"])
def test_two_processes_in_bf16(shared, plain, label_head):
    found = result_of(shared, "fsdp2-bf16", label_head)
    losses = zip(found["losses"], plain[label_head][0], strict=True)
    assert max(abs(mine - theirs) for mine, theirs in losses) <= LOSS_STEP_BF16
    assert enough(found["counts"], parts_of(label_head), PASSES // 2), found["counts"]


@pytest.mark.slow
def test_a_layer_that_is_sharded_from_within_says_so_once(shared):
    said = [each for each in shared["notices"] if "run PEFT's own forward" in each]
    assert len(said) == 1
    assert "Wrap complete decoder layers" in said[0]


@pytest.mark.slow
def test_two_processes_by_the_trainer(shared, trained_plain):
    found = result_of(shared, "trainer", True)
    assert close((found["losses"], found["gradients"]), trained_plain)
    assert enough(found["counts"], TRAINER, PASSES // 2), found["counts"]


@pytest.mark.slow
def test_other_rows_show(shared, plain):
    """The comparison of two processes with one can fail: each process alone has other losses and gradients."""
    found = result_of(shared, "ddp", True)
    half = train(adapted(True), accumulation=ROWS // 2, processes=2, fused_lm_head=True)
    assert not close((found["losses"], found["gradients"]), half)
    assert not close(half, plain[True])
