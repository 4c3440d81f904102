"""Several processes of one run, as torchrun, accelerate or Slurm start them: who writes, who waits, who speaks.

The groups are accelerate's and PyTorch's. What stands here goes through the launcher's key-value store, which has no
limit of time: the others wait for hours of data preparation without a collective that gives up.

The modules above load without torch; so does this one, until there is more than one process.
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
"""How long a process waits for the store, while others still start."""

LAST_WORD_SECONDS = 20.0
"""How long a process that has failed waits for the one that failed first to say why."""

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as accelerate looks for them
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")

# What gloo and PyTorch's stores say when the other end of a connection is closed.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Application timeout caused pair")


class Elsewhere(PhiloraError, RuntimeError):
    """Another process of the run has failed and says why; this one only ends with it."""

    exit_code = 1


def _first(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def count() -> int:
    """Processes of this run, on all machines."""
    return _first(_SIZES, 1)


def rank() -> int:
    """This process's number, from 0."""
    return _first(_RANKS, 0) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this process is the one that writes and speaks."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine."""
    return _first(_LOCAL_RANKS, rank()) if count() > 1 else 0


def local_count() -> int:
    """Processes of this run on this machine."""
    return _first(_LOCAL_SIZES, count()) if count() > 1 else 1


def command(arguments: Sequence[str]) -> list[str]:
    """Return what a person types to start this run once more, whoever has started it now."""
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
    """Make accelerate's state and with it the group of processes; nothing for a single one.

    Args:
        timeout_seconds: How long a collective may take; `training_config.ddp_timeout`.
        cpu: Train on the CPU although there is a GPU.

    Raises:
        RunError: The others did not come.
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
    """Return whether FSDP works on a CPU: accelerate up to 1.15 looks for its plugin on accelerators only."""
    return False


def not_here(given: Mapping[str, Any], source: str) -> list[str]:
    """Return what `training_config` asks for and this machine cannot do: FSDP on a CPU, missing DeepSpeed."""
    import torch

    faults = []
    cpu = bool(given.get("use_cpu", False)) or not torch.accelerator.is_available()
    if given.get("fsdp") and cpu and not shards_on_cpu():
        expected = "nothing on a CPU, where accelerate would train without it and not say so"
        todo = "Leave it out: several processes on a CPU train by DDP"
        faults.append(fault(source, "training_config.fsdp", given["fsdp"], expected, todo))
    deepspeed = given.get("deepspeed") or launched_for_deepspeed()
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        expected = "the package deepspeed, which is not installed"
        todo = "Install it: pip install deepspeed"
        faults.append(fault(source, "training_config.deepspeed", deepspeed, expected, todo))
    return faults


def idle_gpus(given: Mapping[str, Any], device_map: Any) -> int:
    """Return how many visible GPUs a run leaves alone: without a launcher a process trains on one.

    Args:
        given: The run's `training_config`.
        device_map: The run's `model.device_map`.
    """
    import torch

    if count() > 1 or given.get("use_cpu") or given.get("deepspeed") or device_map is not None:
        return 0
    return max(0, torch.cuda.device_count() - 1)


def idle_gpus_notice(given: Mapping[str, Any], device_map: Any) -> str | None:
    """Return a notice about GPUs that the run leaves alone, with the command that uses them all; None without any."""
    idle = idle_gpus(given, device_map)
    if not idle:
        return None
    return (
        f"{idle + 1} GPUs are visible and one process trains, on the first of them. On all of them: torchrun "
        f"--nproc-per-node {idle + 1} -m philora train CONFIG. CUDA_VISIBLE_DEVICES=1 chooses another one."
    )


# -------------------------------------------------------------------------------------------- the store

_store: Any = None
_calls = 0


def _shared() -> Any:
    """The launcher's store, or one that the first process holds where the launcher has none."""
    global _store
    if _store is None:
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, _, _ = next(rendezvous("env://", timeout=CONNECT))
        # A group of workers that torchrun starts again must not read what the one before it has written.
        _store = PrefixStore(f"philora/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return _store


def _next_key() -> str:
    """A name that all processes give to the same call: they make the same calls in the same order."""
    global _calls
    _calls += 1
    return f"call-{_calls}"


def _wait(key: str, seconds: float = float("inf")) -> bytes | None:
    """The value of a key once it is there, or None after so many seconds; a signal is heard while it waits."""
    store, pause, end = _shared(), 0.001, time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > end:
            return None
        time.sleep(pause)
        pause = min(0.2, 1.5 * pause)
    return bytes(store.get(key))


_FAILED = b"failed"

PART_BYTES = 1 << 20
"""Of a value that goes through the store at a time: PyTorch's closes the connection at values above 8 MiB."""


def _give(key: str, value: object) -> None:
    """Put a value into the store, in parts; the key itself comes last, with their number."""
    whole = pickle.dumps(value)
    parts = range(0, len(whole), PART_BYTES)
    for number, start in enumerate(parts):
        _shared().set(f"{key}/{number}", whole[start : start + PART_BYTES])
    _shared().set(key, str(len(parts)))


def _take(key: str, which: int) -> Any:
    """The value that a process has given, however long it takes.

    Raises:
        Elsewhere: The process has failed.
    """
    said = _wait(key)
    if said is None or said == _FAILED:
        _end_with(f"process {which}")
    # Written by a process of this run, for this run.
    return pickle.loads(b"".join(bytes(_shared().get(f"{key}/{number}")) for number in range(int(said))))


def on_main(work: Callable[[], T]) -> T:
    """Do something in the main process only, and give its result to all; the others wait for as long as it takes.

    Raises:
        Elsewhere: In the others, when it failed in the main process, which raises what went wrong.
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
    raise Elsewhere(fault("run", "process", rank(), f"{which} to continue", "It says why it did not"))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """One process of every machine works first, and leaves to the others what it has put into a cache.

    Raises:
        Elsewhere: In the others, when the first one failed.
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


# -------------------------------------------------------------------------------------------- together


def agreed(value: int) -> int:
    """The largest of the processes' numbers, in all of them, by a collective: for what is asked at every step."""
    if count() == 1:
        return value
    import torch
    from accelerate import PartialState

    number = torch.tensor(value, device=PartialState().device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of their ranks, in all of them, however long the slowest takes."""
    if count() == 1:
        return [value]
    key = _next_key()
    _give(f"{key}-{rank()}", value)
    return [value if index == rank() else cast("T", _take(f"{key}-{index}", index)) for index in range(count())]


def share(length: int) -> range:
    """This process's part of so many things: a block, so that the parts put together keep their order."""
    return range(length * rank() // count(), length * (rank() + 1) // count())


# -------------------------------------------------------------------------------------------- one voice


def lost(error: BaseException) -> bool:
    """Return whether an error says that another process has ended."""
    if count() == 1 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "DistNetworkError" or any(item in str(error) for item in _LOST)


@contextlib.contextmanager
def last_word(text: str, code: int, error: BaseException | None) -> Iterator[tuple[bool, int]]:
    """Around the message of a failure: the first process to fail says it, the others end with its exit code.

    Args:
        text: The message; torchrun's own report shows it too.
        code: The exit code of this process's failure.
        error: The failure; `Elsewhere` leaves the word to another.

    Yields:
        Whether this process is to speak, and the exit code.
    """
    if count() == 1:
        yield True, code
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which the launcher ends those that are left
    said = _claim(error)
    why, code = (text, code) if said is None else said
    _tell_launcher(why)  # in every process: torchrun's report is of the one that it sees end first
    yield said is None, code
    if said is None:
        with contextlib.suppress(RuntimeError, ValueError, OSError):
            _shared().set("said", json.dumps([text, code]))


def _tell_launcher(text: str) -> None:
    """Leave the message where torchrun looks for it; else its report names a page about missing tracebacks."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def _claim(error: BaseException | None) -> tuple[str, int] | None:
    """None for the process that is to speak, else the message and the exit code of the one that did."""
    try:
        if not isinstance(error, Elsewhere) and _shared().add("failures", 1) == 1:
            return None
        said = _wait("said", LAST_WORD_SECONDS)
        return None if said is None else cast("tuple[str, int]", tuple(json.loads(said)))
    except (RuntimeError, ValueError, OSError):  # no store: each speaks for itself
        return None
