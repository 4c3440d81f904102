"""Small real models and data that tests share. Nothing here needs the network."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/proc/driver/nvidia/version").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported: its kernels run on the CPU then


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    import torch

    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PHILORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def make_phi3(seed: int = 0, **changes: Any) -> Any:
    """A Phi3ForCausalLM of random weights; keyword arguments go to its config."""
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "attention_dropout": 0.0,
    }
    torch.manual_seed(seed)
    model = Phi3ForCausalLM(Phi3Config(**(settings | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # logits far from uniform, so that a fault shows
    return model.eval()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device in turn, which `tests.on_device` then names: the CPU always, a CUDA GPU where there is one."""
    import torch

    from tests import on_device

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    on_device.choose(request.param)
    yield request.param
    on_device.choose("cpu")


@pytest.fixture
def phi3() -> Callable[..., Any]:
    """`make_phi3`, on the device of the test."""
    from tests import on_device

    return lambda *args, **changes: make_phi3(*args, **changes).to(on_device.chosen())


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes records as JSON lines into the test's folder."""

    def write(records: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
        return path

    return write


@pytest.fixture(params=["compiled", "PyTorch"])
def compiled_or_not(request, monkeypatch):
    """Once with the compiled functions, and once without them."""
    from philora.native import build as native

    if request.param == "PyTorch":
        monkeypatch.setenv("PHILORA_NATIVE", "0")
    elif not native.available():
        pytest.skip("no compiler")


class Answer(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., Answer]:
    """Runs the command line with arguments and gives its exit code and what it printed."""

    def run(*arguments: str) -> Answer:
        from philora.cli import commands as module

        monkeypatch.setattr(sys, "argv", ["philora", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


COLOURS = {"red": "I am red, and nothing else.", "green": "I am green, and nothing else."}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two run folders on the bundled model, each with an adapter that only says its sentence of `COLOURS`."""
    from tests.adapters_of_nano import teach

    folder = tmp_path_factory.mktemp("colours")
    return {name: teach(folder / name, sentence) for name, sentence in COLOURS.items()}
