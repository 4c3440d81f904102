"""`philora.train` from scripts: twice in one process, in a thread, in an event loop, with processes of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import philora

ROOT = Path(__file__).parents[3]


def settings(folder, **training):
    return {
        "model": {"name_or_path": "nano", "dtype": "float32"},
        "data": {
            "train": {"path": "helpdesk", "limit": 24}, "eval": {"path": "helpdesk", "limit": 4},
            "cache_dir": str(folder),
        },
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training_config": {
            "output_dir": str(folder / "run"), "max_steps": 2, "max_length": 64, "tokens_per_step": 128, **training,
        },
        "peft_config": {"r": 2, "target_modules": ["o_proj"]},
    }  # fmt: skip


def loss_of(folder, **training):
    return philora.train(settings(folder, **training), quiet=True).results["after"]["loss"]


@pytest.mark.slow
def test_twice_in_one_process_in_a_thread_and_in_an_event_loop(tmp_path):
    found = []

    def in_thread():
        found.append(loss_of(tmp_path / "c"))

    async def in_event_loop():
        return loss_of(tmp_path / "d")

    first, second = loss_of(tmp_path / "a"), loss_of(tmp_path / "b")
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert [first, second, *found, asyncio.run(in_event_loop())] == [first] * 4
    assert loss_of(tmp_path / "e", seed=7) != first


@pytest.mark.slow
def test_with_processes_that_tokenise_and_spawned_loader_workers(tmp_path):
    """A script as people write it, with the start method of macOS and Windows."""
    (tmp_path / "own").mkdir()
    for name, program in {
        "plain": "config = settings(folder)\nstart = None",
        "num_proc": "config = settings(folder)\nconfig['data']['num_proc'] = 2\nstart = None",
        "spawn": "config = settings(folder, dataloader_num_workers=2)\nstart = 'spawn'",
    }.items():
        (tmp_path / f"{name}.py").write_text(
            "import multiprocessing, pathlib, sys\n"
            "import philora\n"
            "from tests.unit.interface.test_run import settings\n"
            "if __name__ == '__main__':\n"
            "    folder = pathlib.Path(sys.argv[1])\n"
            + "".join(f"    {line}\n" for line in program.splitlines())
            + "    if start:\n"
            "        multiprocessing.set_start_method(start)\n"
            "    print(philora.train(config, quiet=True).results['after']['loss'])\n"
        )
    losses = []
    for name in ("plain", "num_proc", "spawn"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, str(tmp_path / f"{name}.py"), str(tmp_path / "own" / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr
        losses.append(done.stdout.split()[-1])
    assert losses == [losses[0]] * 3
