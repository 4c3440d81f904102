"""Coordinate the processes that torchrun, accelerate or Slurm start: which one writes, waits or reports errors.

Process groups are accelerate's and PyTorch's. The functions here use the launcher's key-value store, which has no time
limit: other processes can wait for hours of data preparation, which would time out a collective.

This module loads without torch as long as there is only one process.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from philora.errors import PhiloraError, RunError, fault

T = TypeVar("T")

CONNECT = datetime.timedelta(minutes=30)
"""How long a process waits for the store while others are starting."""

LAST_WORD_SECONDS = 20.0
"""How long a failed process waits for the message of the process that failed first."""

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate looks for them
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

# Messages of gloo and PyTorch's stores about a connection that the other side has closed.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Application timeout caused pair")


class Elsewhere(PhiloraError, RuntimeError):
    """Another process of the run has failed and reports the error; this one ends with it."""

    exit_code = 1


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def count() -> int:
    """Return the number of processes of this run, on all machines."""
    return _first(_SIZES, 1)


def rank() -> int:
    """Return this process's rank, from 0."""
    return _first(_RANKS, 0) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the one that writes files and messages."""
    return rank() == 0


def local_rank() -> int:
    """Return this process's rank on its machine."""
    return _first(_LOCAL_RANKS, rank()) if count() > 1 else 0


def local_count() -> int:
    """Return the number of processes of this run on this machine."""
    return _first(_LOCAL_SIZES, count()) if count() > 1 else 1


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command that starts this run again, with torchrun if it has several processes."""
    if count() == 1:
        return ["philora", *arguments]
    options = ["--nproc-per-node", str(local_count())]
    if count() > local_count():
        place = f"{os.environ.get('MASTER_ADDR', 'HOST')}:{os.environ.get('MASTER_PORT', 'PORT')}"
        machines = str(count() // local_count())
        options = ["--nnodes", machines, *options, "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    return ["torchrun", *options, "-m", "philora", *arguments]


def left_alone() -> bool:
    """Return whether `accelerate launch --cpu` should have started several processes: without mpirun it starts one."""
    return count() == 1 and "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


def launched_for_deepspeed() -> bool:
    """Return whether accelerate's launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def join(timeout_seconds: float, cpu: bool = False) -> None:
    """Create accelerate's state and with it the process group; does nothing for a single process.

    Args:
        timeout_seconds: Time limit of a collective; `training_config.ddp_timeout`.
        cpu: Train on the CPU even if there is a GPU.

    Raises:
        RunError: The processes did not reach each other.
    """
    if count() == 1:
        return
    import torch
    from accelerate import PartialState
    from accelerate.utils import str_to_bool

    cpu = cpu or not torch.accelerator.is_available() or str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "no")) == 1
    try:
        PartialState(cpu=cpu, timeout=datetime.timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        expected = f"{count()} processes that reach each other: {' '.join(str(error).split())[:200]}"
        raise RunError(fault("run", "processes", rank(), expected, "Look at the launcher's messages")) from error


def shards_on_cpu() -> bool:
    """Return whether FSDP works on a CPU: accelerate up to 1.15 uses its plugin on accelerators only."""
    return False


def not_here(given: Mapping[str, Any], source: str) -> list[str]:
    """Return faults for settings that this machine does not support: FSDP on a CPU, DeepSpeed if it is missing."""
    import torch

    faults = []
    cpu = bool(given.get("use_cpu", False)) or not torch.accelerator.is_available()
    if given.get("fsdp") and cpu and not shards_on_cpu():
        expected = "nothing on a CPU, where accelerate would train without it silently"
        todo = "Leave it out: several processes on a CPU train by DDP"
        faults.append(fault(source, "training_config.fsdp", given["fsdp"], expected, todo))
    deepspeed = given.get("deepspeed") or launched_for_deepspeed()
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        expected = "the package deepspeed, which is not installed"
        todo = "Install it: pip install deepspeed"
        faults.append(fault(source, "training_config.deepspeed", deepspeed, expected, todo))
    return faults


def idle_gpus(given: Mapping[str, Any], device_map: Any) -> int:
    """Return how many visible GPUs a run with this `training_config` leaves: without a launcher one GPU trains."""
    import torch

    if count() > 1 or given.get("use_cpu") or given.get("deepspeed") or device_map is not None:
        return 0
    return max(0, torch.cuda.device_count() - 1)


def idle_gpus_notice(given: Mapping[str, Any], device_map: Any) -> str | None:
    """Return a notice about unused GPUs with the command that uses them all, or None."""
    idle = idle_gpus(given, device_map)
    if not idle:
        return None
    return (
        f"{idle + 1} GPUs are visible and one process trains, on the first of them. On all of them: torchrun "
        f"--nproc-per-node {idle + 1} -m philora train CONFIG. CUDA_VISIBLE_DEVICES=1 chooses another one."
    )


_store: Any = None
_calls = 0


def _shared() -> Any:
    """Return the launcher's store, or one in the first process if the launcher has none."""
    global _store
    if _store is None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=CONNECT))
        # Workers that torchrun restarts must not read the values of the previous ones.
        _store = PrefixStore(f"philora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return _store


def _next_key() -> str:
    """Return a key that is the same in all processes, since they make the same calls in the same order."""
    global _calls
    _calls += 1
    return f"call-{_calls}"


def _wait(key: str, seconds: float = float("inf")) -> bytes | None:
    """Wait for a key and return its value, or None after a timeout. Signals are handled in the meantime."""
    store, pause, end = _shared(), 0.001, time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return None
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
    return bytes(store.get(key))


_FAILED = b"failed"

PART_BYTES = 1 << 20
"""Bytes of a value per entry of the store: PyTorch's closes the connection at values above 8 MiB."""


def _give(key: str, value: object) -> None:
    """Store a value in parts; the key itself is written last, with their number."""
    data = pickle.dumps(value)
    parts = range(0, len(data), PART_BYTES)
    for number, start in enumerate(parts):
        _shared().set(f"{key}/{number}", data[start : start + PART_BYTES])
    _shared().set(key, str(len(parts)))


def _take(key: str, which: int) -> Any:
    """Return the value that a process has stored, however long it takes.

    Raises:
        Elsewhere: The process has failed.
    """
    parts = _wait(key)
    if parts is None or parts == _FAILED:
        _end_with(f"process {which}")
    # The pickle was written by a process of this run.
    return pickle.loads(b"".join(bytes(_shared().get(f"{key}/{number}")) for number in range(int(parts))))


def on_main(work: Callable[[], T]) -> T:
    """Call a function in the main process only, and return its result in all; the others wait as long as it takes.

    Raises:
        Elsewhere: In the other processes, if it failed in the main process, which raises the error itself.
    """
    if count() == 1:
        return work()
    key = _next_key()
    if not is_main():
        return cast("T", _take(key, 0))
    try:
        result = work()
    except BaseException:
        _shared().set(key, _FAILED)
        raise
    _give(key, result)
    return result


def _end_with(which: str) -> NoReturn:
    raise Elsewhere(fault("run", "process", rank(), f"{which} to continue", "Its message has the reason"))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in one process per machine first, so that the others find its results in a cache.

    Raises:
        Elsewhere: In the other processes, if the first one failed.
    """
    if count() == 1:
        yield
        return
    first = rank() - local_rank()
    key = f"{_next_key()}-{first}"
    if local_rank() > 0:
        if _wait(key) == _FAILED:
            _end_with(f"process {first}")
        yield
        return
    try:
        yield
    except BaseException:
        _shared().set(key, _FAILED)
        raise
    _shared().set(key, b"done")


def agreed(value: int) -> int:
    """Return the largest of the processes' numbers, by a collective, for use in every step."""
    if count() == 1:
        return value
    import torch
    from accelerate import PartialState

    number = torch.tensor(value, device=PartialState().device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def gathered(value: T) -> list[T]:
    """Return the values of all processes in the order of ranks, however long the slowest takes."""
    if count() == 1:
        return [value]
    key = _next_key()
    _give(f"{key}-{rank()}", value)
    return [value if index == rank() else cast("T", _take(f"{key}-{index}", index)) for index in range(count())]


def share(length: int) -> range:
    """Return the indices of this process's part of a list: a block, so that joined parts keep the order."""
    return range(length * rank() // count(), length * (rank() + 1) // count())


def lost(error: BaseException) -> bool:
    """Return whether an error means that another process has ended."""
    if count() == 1 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "DistNetworkError" or any(item in str(error) for item in _LOST)


@contextlib.contextmanager
def last_word(text: str, code: int, error: BaseException | None) -> Iterator[tuple[bool, int]]:
    """Let only the first failed process print the message of a failure; the others end with its exit code.

    Args:
        text: The message; torchrun's own report shows it too.
        code: The exit code of this process's failure.
        error: The failure; with `Elsewhere` another process prints its message.

    Yields:
        Whether this process prints the message, and the exit code.
    """
    if count() == 1:
        yield True, code
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it to the remaining processes
    first = _first_failure(error)
    why, code = (text, code) if first is None else first
    _tell_launcher(why)  # in every process: torchrun reports the one that it sees end first
    yield first is None, code
    if first is None:
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            _shared().set("said", json.dumps([text, code]))


def _tell_launcher(text: str) -> None:
    """Write the message where torchrun looks for it; else its report links to a page about missing tracebacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _first_failure(error: BaseException | None) -> tuple[str, int] | None:
    """Return the message and exit code of the process that failed first; None if it is this one."""
    try:
        if not isinstance(error, Elsewhere) and _shared().add("failures", 1) == 1:
            return None
        found = _wait("said", LAST_WORD_SECONDS)
        return None if found is None else cast("tuple[str, int]", tuple(json.loads(found)))
    except (RuntimeError, ValueError, OSError):  # without a store every process prints its own message
        return None
