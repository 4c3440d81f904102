"""What is said of devices that cannot do well what a run asks of them, by made-up facts."""

from __future__ import annotations

import logging

import pytest
import torch

import philora
from philora.decoder_stack import facts
from philora.decoder_stack.choice import DeviceFacts
from philora.kernels.memory import out_of_memory
from philora.planning import plan as planning
from philora.planning.hardware import hardware_notices, slow_bf16

T4 = DeviceFacts(name="Tesla T4", capability=(7, 5), memory_bytes=15_800_000_000, flash=False)
CPU = DeviceFacts(kind="cpu", name="a CPU", capability=None, flash=False)
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)"


def said(device, dtype="auto", cuda="13.0", **settings):
    return " ".join(hardware_notices(device, dtype, cuda, **settings))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", "weights are in float32. model.dtype=float16 with training_config.fp16=true"),
        ("bfloat16", "bf16 is emulated. model.dtype=float16"),
        ("float16", "training is slow there."),
    ],
)
def test_a_gpu_without_bf16_and_flash(dtype, expected):
    text = said(T4, dtype)
    assert text.startswith("Tesla T4 has compute capability 7.5: no bf16 and no flash attention")
    assert expected in text


def test_nothing_is_said_of_what_works():
    assert said(DeviceFacts()) == said(CPU) == ""


def test_a_driver_that_is_older_than_the_cuda_of_pytorch():
    device = DeviceFacts(kind="cpu", name="a CPU", capability=None, problem=OLD_DRIVER)
    text = said(device)
    assert text.startswith("the NVIDIA driver is older than PyTorch's CUDA 13.0, so the GPU is not used")
    assert "found version 11040" in text
    assert "Update the driver, or install a PyTorch" in text
    assert said(device, use_cpu=True) == "", "nobody asked for the GPU"
    other = DeviceFacts(kind="cpu", name="a CPU", capability=None, problem="CUDA unknown error")
    assert "the GPU cannot be used and the run computes on a CPU: CUDA unknown error" in said(other)


def test_memory_that_cublas_was_refused_is_memory_that_is_out():
    for name in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"):
        assert out_of_memory(RuntimeError(f"CUDA error: {name} when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"))


def test_bf16_on_a_processor_without_it_proposes_float32_where_memory_allows():
    assert "Set model.dtype to float32: the run then needs about 12.00 GB of 14.00 GB" in slow_bf16(
        12 * 10**9, 14 * 10**9
    )
    assert "In float32 the run would need about 16.00 GB" in slow_bf16(16 * 10**9, 14 * 10**9)


@pytest.mark.parametrize(
    ("dtype", "fast", "expected"),
    [
        ("bfloat16", False, 1),
        pytest.param("bfloat16", True, 0, marks=pytest.mark.slow),
        pytest.param("float32", False, 0, marks=pytest.mark.slow),
    ],
)
def test_check_and_train_say_it_once(tmp_path, monkeypatch, caplog, dtype, fast, expected):
    monkeypatch.setattr(planning, "bf16_is_fast", lambda device=None: fast)
    settings = {
        "model": {"name_or_path": "nano", "dtype": dtype},
        "data": {"train": {"path": "helpdesk", "limit": 8}, "eval": None},
        "training_config": {
            "output_dir": str(tmp_path / "run"), "max_steps": 1, "max_length": 64, "save_strategy": "no",
            "eval_strategy": "no", "use_cpu": True,
        },
    }  # fmt: skip
    found = [each for each in philora.preflight(settings).notices if "no bf16 instructions" in each]
    assert len(found) == expected
    with caplog.at_level(logging.WARNING):
        philora.train(settings, quiet=True)
    assert sum("no bf16 instructions" in each.getMessage() for each in caplog.records) == expected
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("Found no NVIDIA driver on your system.\nPlease check", None),
        ("CUDA unknown error\nmore", "CUDA unknown error"),
    ],
)
def test_pytorch_for_cuda_on_a_laptop_without_a_gpu_is_no_problem(monkeypatch, message, problem):
    def init():
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert facts._unusable_gpu() == problem
