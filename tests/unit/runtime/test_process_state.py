"""A library call leaves the process as it found it; a run sets what it needs."""

from __future__ import annotations

import subprocess
import sys

import datasets
import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as transformers_logging

import philora
from philora.errors import ConfigError
from philora.kernels import memory
from philora.runtime import hub, process_state

# In a process of its own: what is looked at is the process.
SCRIPT = """
import ctypes, logging, os, signal, sys, tempfile, threading, warnings
import torch
import peft, transformers, trl, datasets  # as a script has them before philora
from huggingface_hub import constants
from transformers.utils import logging as transformers_logging

set_by = []
class Libc:
    def __init__(self, name):
        self.real = REAL(name)
    def __getattr__(self, name):
        if name == "mallopt":
            set_by.append(name)
        return getattr(self.real, name)
REAL = ctypes.CDLL
ctypes.CDLL = lambda name, *args, **options: Libc(name) if name == "libc.so.6" else REAL(name, *args, **options)

def state():
    loggers = {name: (each.level, [str(f) for f in each.filters], [type(h) for h in each.handlers], each.propagate)
               for name, each in logging.root.manager.loggerDict.items()
               if isinstance(each, logging.Logger) and not name.startswith("philora")}
    return {
        "environment": dict(os.environ), "folder": os.getcwd(), "warnings": list(warnings.filters),
        "malloc": list(set_by), "threads": torch.get_num_threads(),
        "onednn": (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.enabled),
        "offline": (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE),
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "random": torch.get_rng_state().sum().item(), "gradients": torch.is_grad_enabled(),
        "bars": (transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "hooks": (sys.excepthook, threading.excepthook, sys.getrecursionlimit()),
        "forward": (torch.nn.Linear.forward, peft.tuners.lora.Linear.forward, trl.SFTTrainer.__init__),
        "loggers": loggers,
    }

def unchanged(what, call):
    before = state()
    result = call()
    after = state()
    for key, value in before.items():
        if key == "loggers":
            changed = {name: each for name, each in value.items() if after[key].get(name) != each}
            assert not changed, (what, changed)
        elif key != "random" or "get_peft_model" not in what:
            assert after[key] == value, (what, key, value, after[key])
    return result
"""

CALLS = """
import philora
unchanged("import", lambda: [getattr(philora, each) for each in philora.__all__])
from tests.conftest import make_phi3
from peft import LoraConfig

folder = tempfile.mkdtemp()
base = make_phi3().bfloat16()
base.save_pretrained(folder + "/base")
unchanged("optimize", lambda: philora.optimize(base))
model = unchanged("get_peft_model", lambda: philora.get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])))
positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
unchanged("a step", lambda: model(input_ids=torch.ones(1, 12, dtype=torch.long), position_ids=positions,
                                  use_cache=False).logits.float().sum().backward())
unchanged("coverage", lambda: str(philora.coverage(model)))
unchanged("save", lambda: model.save_pretrained(folder + "/adapter"))
loaded = unchanged("load_adapter", lambda: philora.load_adapter(make_phi3().bfloat16(), folder + "/adapter"))
from philora.models import loading as models
from philora.configuration.config import ModelConfig
unchanged("merge", lambda: loaded.merge_and_unload())
unchanged("the hub's check", lambda: (__import__("philora.runtime.hub").runtime.hub.reach(), None)[1])
print("unchanged")
"""


@pytest.mark.slow
def test_library_calls_leave_the_process_as_it_is():
    code = SCRIPT + CALLS
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "unchanged"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("os.environ['X'] = '1'", "environment"),
        ("torch.backends.mkldnn.matmul.__setattr__('fp32_precision', 'bf16')", "onednn"),
        ("ctypes.CDLL('libc.so.6').mallopt(-3, 1 << 30)", "malloc"),
    ],
)
def test_the_snapshot_sees_a_change(change, named):
    code = SCRIPT + f"exec_it = lambda: exec({change!r})\nunchanged('planted', exec_it)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"('planted', '{named}'" in run.stderr


def test_a_run_sets_the_allocator_and_a_library_call_does_not(monkeypatch):
    calls = []

    class Libc:
        def mallopt(self, *arguments):
            calls.append(arguments)
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Libc())
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD", "PHILORA_FUSED"):
        monkeypatch.delenv(name, raising=False)
    for each in list(memory.os.environ):
        if each.startswith("MALLOC_"):
            monkeypatch.delenv(each)
    assert not process_state.is_run()
    assert not memory.keep_freed_memory()
    assert not calls
    with process_state.run():
        assert memory.keep_freed_memory()
    assert calls
    assert not process_state.is_run()


def test_a_download_says_by_itself_that_there_is_no_network(monkeypatch):
    monkeypatch.setattr(hub, "_has_no_network", lambda _: True)
    assert hub.reach() == {"local_files_only": True}
    monkeypatch.setattr(hub, "_has_no_network", lambda _: False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.reach() == {}


def libraries():
    bars = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    return transformers_logging.get_verbosity(), *bars, datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("bars", [True, False])
def test_a_run_leaves_the_progress_bars_and_the_verbosity_of_libraries(bars):
    before = libraries()
    transformers_logging.set_verbosity_info()
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    (datasets.enable_progress_bars if bars else datasets.disable_progress_bars)()
    try:
        mine = libraries()
        with pytest.raises(ConfigError):
            philora.train({"training_config": {"no_such_key": 1}})
        assert libraries() == mine
        with process_state.quiet_libraries():
            assert libraries() == (transformers_logging.WARNING, False, True, True)
        assert libraries() == mine
    finally:
        transformers_logging.set_verbosity(before[0])
        (transformers_logging.enable_progress_bar if before[1] else transformers_logging.disable_progress_bar)()
        (datasets.disable_progress_bars if before[3] else datasets.enable_progress_bars)()
