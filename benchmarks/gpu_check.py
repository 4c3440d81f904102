"""Run all checks and measurements on a GPU, in one command of less than six minutes: `make gpu`.

    python -m benchmarks.gpu_check [--minutes 5.8] [--only PART ...]
    python -m benchmarks.gpu_check --quick --device cpu        # a tiny model, few tests: does it run?

| part | what runs |
| --- | --- |
| `parity` | the tests that are marked `gpu` |
| `bf16`, `nf4` | the main job on the bundled model, from a configuration to an adapter |
| `resume` | the same, stopped by a signal and resumed: its adapter has the bits of the run that went through |
| `speed` | `benchmarks.gpu` on the most telling cases; its rows go to results/gpu.csv |
| `answers` | `benchmarks.generation` with one row and 64, beside transformers; rows go to results/generation_gpu.csv |
| `profile` | one step of philora's trainer under PyTorch's profiler: where its time goes, and waits for the device |

Each part is a process of its own with a limit, so that one that fails or hangs costs its own time only. `speed` also
gets what the parts before it leave of their time. On a card a job whose decoder layers ran without the stack has
failed. It needs Python, PyTorch, Triton and the packages of tools/gpu_carry.txt, no network, no git and no installed
philora. A table ends it, and rows go to results/gpu_check.csv.
"""

from __future__ import annotations

import argparse
import ast
import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.results import RESULTS, append, commit, now

REPOSITORY = Path(__file__).parents[1]
# In order of value. philora's first six, and those after the others, each take one process.
SPEED = ",".join(
    [
        *(f"philora/{base}/{tokens}/keep" for base in ("bf16", "fp8", "nf4") for tokens in (2048, 8192)),
        "trl/bf16/2048/keep",
        "trl/bf16/8192/keep",
        "trl/nf4/2048/keep",
        "liger/bf16/2048/keep",
        "liger/bf16/8192/keep",
        "philora/bf16/8192/keep+dropout",
        "philora/bf16/2048/keep+graphs",
        "philora/nf4/16384/host",
        "unsloth/bf16/2048/keep",
    ]
)
# Seconds of each part, which add up to less than six minutes.
SECONDS = {
    "parity": 80.0, "bf16": 25.0, "nf4": 25.0, "resume": 35.0, "speed": 110.0, "answers": 40.0, "profile": 30.0,
}  # fmt: skip
ROWS = (1, 64)
"""Rows that answers are timed with."""


def allowance(part: str, left: float, later: Sequence[str], scale: float = 1.0) -> float:
    """Return the seconds of a part: its own, and for `speed` all that is not meant for later parts.

    Args:
        part: Its name.
        left: Seconds until everything has to be over.
        later: The parts after it.
        scale: Of the seconds in `SECONDS`.
    """
    if part == "speed":
        return max(1.0, left - scale * sum(SECONDS[item] for item in later))
    return max(1.0, min(scale * SECONDS[part], left))


class Outcome(NamedTuple):
    """Hold the result of a part.

    Attributes:
        part: Its name.
        status: `ok`, `failed` or `too slow`.
        seconds: It took.
        said: The last line of its output.
    """

    part: str
    status: str
    seconds: float
    said: str


def commands(device: str, quick: bool, seconds: float) -> dict[str, list[str]]:
    """The command of each part.

    Args:
        device: cuda or cpu.
        quick: Whether a few small things are enough.
        seconds: For the part `speed`.
    """
    own = [sys.executable, "-m", "benchmarks.gpu_check", "--device", device, *(["--quick"] if quick else []), "--part"]
    tests = ["-m", "gpu and not slow"] if device == "cuda" else ["-m", "not gpu", "-k", "cpu"]
    if device == "cuda" and find_spec("xdist") is not None:
        tests += ["-n", "4", "--dist", "worksteal"]  # kernels are compiled on the host, one after the other
    tests += ["tests/unit/kernels/test_elementwise.py"] if quick else test_files()
    speed = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--minutes", f"{seconds / 60:.2f}"]
    speed += ["--warmup", "3", "--steps", "6", "--only", "philora/bf16/256/keep" if quick else SPEED]
    answers = [sys.executable, "-m", "benchmarks.generation", "--device", device]
    answers += ["--work", "mini", "--rows", ",".join(map(str, ROWS)), "--rounds", "1", "--new-tokens", "128"]
    return {
        "parity": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x" if quick else "-q", *tests],
        **{part: [*own, part] for part in ("bf16", "nf4", "resume")},
        "speed": [*speed, *(["--quick"] if quick else [])],
        "answers": [*answers, *(["--quick"] if quick else [])],
        "profile": [*own, "profile"],
    }


@functools.cache
def test_files() -> list[str]:
    """Return the files whose tests can run on a card. Others need packages that the machine does not have.

    Those of the benchmarks are left out: the part `speed` runs what they test.
    """
    folder = REPOSITORY / "tests" / "unit"
    found = [path for path in sorted(folder.rglob("test_*.py")) if "benchmarks" not in path.parts]
    return [str(path.relative_to(REPOSITORY)) for path in found if has_gpu_tests(path.read_text(encoding="utf-8"))]


def has_gpu_tests(source: str) -> bool:
    """Return whether a test of a file is marked `gpu`, or uses the fixture `device`."""
    return any(_is_for_a_gpu(node) for node in ast.walk(ast.parse(source)))


def _is_for_a_gpu(node: ast.AST) -> bool:
    """Return whether this is the mark, a `usefixtures` with the fixture, or a test or fixture that asks for it."""
    if isinstance(node, ast.Attribute):
        return node.attr == "gpu" and isinstance(node.value, ast.Attribute) and node.value.attr == "mark"
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "usefixtures":
        return any(isinstance(given, ast.Constant) and given.value == "device" for given in node.args)
    if isinstance(node, ast.FunctionDef):
        decorators = "".join(map(ast.unparse, node.decorator_list))
        asks = node.name.startswith("test") or "fixture" in decorators
        parametrized = re.search(r"parametrize\([^)]*'device'", decorators) is not None
        return asks and not parametrized and any(argument.arg == "device" for argument in node.args.args)
    return False


def run_part(part: str, command: Sequence[str], seconds: float, folder: Path, device: str = "cuda") -> Outcome:
    """Run one part in a process group of its own, which ends with it.

    Args:
        part: Its name.
        command: Its command line.
        seconds: After which it is ended.
        folder: For its output.
        device: cuda or cpu.
    """
    log = folder / f"{part}.log"
    paths = [str(REPOSITORY / "src"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    if device == "cuda":  # tests/conftest.py lets an interpreter run Triton's kernels where it sees no driver
        environment["TRITON_INTERPRET"] = "0"
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "ok" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "too slow"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [item.strip() for item in log.read_text(encoding="utf-8", errors="replace").splitlines() if item.strip()]
    return Outcome(part, status, time.monotonic() - begun, lines[-1][:200] if lines else "")


# ------------------------------------------------------------------------------------------------- the main job


def settings(folder: Path, base: str, device: str) -> dict[str, Any]:
    """The configuration of the main job: 8 steps of the bundled help desk."""
    # On a CPU small steps over the same few rows, in fp32: bf16 is many times slower without bf16 instructions.
    dtype, tokens, rows = ("bfloat16", 1024, 200) if device == "cuda" else ("float32", 256, 6)
    return {
        "model": {"name_or_path": "nano", "dtype": dtype, "quantization": "none" if base == "bf16" else base},
        "data": {"train": {"path": "helpdesk", "limit": rows}, "eval": None},
        "training_config": {
            "output_dir": str(folder),
            "max_steps": 8,
            "max_length": tokens // 2,
            "tokens_per_step": tokens,
            "save_strategy": "steps",
            "save_steps": 3,
            "eval_strategy": "no",
            "logging_steps": 1,
            "use_cpu": device == "cpu",
        },
        "peft_config": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    }


def adapter_of(folder: Path, base: str, device: str, stop: bool = False) -> bytes:
    """Train, with `stop` in two parts, and return the adapter's file.

    Args:
        folder: Of the run.
        base: bf16 or nf4.
        device: cuda or cpu.
        stop: Whether a signal stops the run after 5 steps, and it is resumed.

    Raises:
        RuntimeError: The signal did not stop it, the loss did not fall, or on a card the decoder stack did not run.
    """
    import philora
    from benchmarks.paths import watched
    from philora.runtime.signals import Interrupted

    given = settings(folder, base, device)
    with watched() as taken:
        if stop:
            try:
                philora.train(given, callbacks=[_signal_after(5)], quiet=True)
            except Interrupted:
                pass
            else:
                raise RuntimeError("the signal did not stop the run")
        result = philora.train(given, resume=stop, quiet=True)
    print(f"{base}: decoder layers: {taken}")
    fault = taken.fault() if device == "cuda" else None
    if fault is not None:
        raise RuntimeError(fault)
    losses = [item["loss"] for item in _log(folder) if "loss" in item]
    print(f"{base}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {result.results['throughput']}")
    if not losses[-1] < losses[0]:
        raise RuntimeError("the loss did not fall")
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def _log(folder: Path) -> list[dict[str, Any]]:
    import json

    found: list[dict[str, Any]] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return found


def _signal_after(steps: int) -> Any:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):  # type: ignore[misc]
        """Sends this process a SIGTERM at the end of a step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stop()


def main_job(base: str, device: str) -> None:
    """The job on one base."""
    with tempfile.TemporaryDirectory() as folder:
        adapter_of(Path(folder) / "run", base, device)


def resumed(device: str) -> None:
    """A run that a signal stopped has, resumed, the bits of one that went through.

    Raises:
        RuntimeError: It has not.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = adapter_of(Path(folder) / "whole", "bf16", device)
        parts = adapter_of(Path(folder) / "parts", "bf16", device, stop=True)
    if whole != parts:
        raise RuntimeError("the adapter of the resumed run differs from that of the run that went through")
    print("the resumed run has the same adapter, bit for bit")


# --------------------------------------------------------------------------------------------------- the profile


def profile(device: str, quick: bool) -> None:
    """Profile a step of philora's trainer: the operations that take longest, and calls that wait for the device."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler
    from transformers import TrainerCallback

    from benchmarks import gpu
    from benchmarks.paths import watched
    from benchmarks.work import WORKS, make_rows

    work, tokens = (WORKS["quick"], 256) if quick else (gpu.MINI, 2048)
    case = gpu.Case("philora", "bf16", tokens)
    chosen = gpu.Settings(work, device, 3, 1, seconds=0.0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    recorded = profiler(activities=activities)

    class OneStep(TrainerCallback):  # type: ignore[misc]
        """Profiles the last step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps - 1:
                recorded.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                if device == "cuda":
                    torch.cuda.synchronize()
                recorded.__exit__(None, None, None)

    rows = make_rows(gpu.replace(work, row_tokens=tokens))[:4]
    model = gpu.make_model(work, "bf16", "sdpa", chosen)
    library = __import__("philora")
    with watched() as taken:
        gpu.run_trainer(library, model, gpu.seeded_adapter(), case, rows, chosen, callbacks=[OneStep()])
    order = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    waits = [item for item in recorded.events() or () if "Synchronize" in item.name or item.name == "aten::item"]
    events = len(recorded.events() or ())
    print(f"one step of {tokens} tokens by {taken}: {events} events, {len(waits)} waits for the device")


# --------------------------------------------------------------------------------------------------- the command


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(SECONDS), default=list(SECONDS), help="parts")
    parser.add_argument("--minutes", type=float, default=5.8, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few tests: does it run?")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_check.csv", help="table that rows are added to")
    parser.add_argument("--no-write", action="store_true", help="leave the table as it is")
    parser.add_argument("--part", choices=("bf16", "nf4", "resume", "profile"), help=argparse.SUPPRESS)
    given = parser.parse_args(line)
    given.no_write = given.no_write or (given.quick and given.results == RESULTS / "gpu_check.csv")
    return given


def device_name(device: str) -> str:
    """Describe the machine."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: cuda - expected a CUDA GPU that torch can use. Try --device cpu --quick.")
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def check(given: argparse.Namespace, console: Console) -> int:
    """Run the parts and show what came of them; 1 where one failed."""
    deadline = time.monotonic() + 60 * given.minutes
    stamp = {"date": now(), "commit": commit(REPOSITORY), "device": device_name(given.device)}
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    outcomes = []
    for part in given.only:
        later = given.only[given.only.index(part) + 1 :]
        seconds = allowance(part, deadline - time.monotonic(), later, given.minutes / 5.8)
        command = commands(given.device, given.quick, seconds - 5)[part]
        outcome = run_part(part, command, seconds, folder, given.device)
        outcomes.append(outcome)
        console.print(
            f"{part}: {outcome.status}, {outcome.seconds:.0f} s: {outcome.said}", highlight=False, markup=False
        )
        if part in ("speed", "answers", "profile") or outcome.status != "ok":
            console.print((folder / f"{part}.log").read_text(encoding="utf-8", errors="replace")[-6000:], markup=False)
        if not given.no_write:
            row = {**outcome._asdict(), "seconds": round(outcome.seconds, 1)}
            append(given.results, stamp | row)
    table = Table(box=None, pad_edge=False)
    for column in Outcome._fields:
        table.add_column(column)
    for item in outcomes:
        table.add_row(item.part, item.status, f"{item.seconds:.0f}", item.said[:90])
    console.print(table)
    return int(any(item.status != "ok" for item in outcomes))


def main() -> int:
    """Run the command, or one part of it in its own process."""
    given = arguments()
    if given.part in ("bf16", "nf4"):
        main_job(given.part, given.device)
    elif given.part == "resume":
        resumed(given.device)
    elif given.part == "profile":
        profile(given.device, given.quick)
    else:
        console = Console(soft_wrap=True)
        console.width = max(console.width, 124)
        return check(given, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
