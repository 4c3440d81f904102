"""Test runs against kills, signals, a second run, foreign files, full disks, damaged checkpoints, hostile files.

    python tools/torture.py --all --write docs/reliability.md      the long form
    python tools/torture.py --kills 2 --signals 2 --races 1 --foreign 1 --disks 1 --damage --fuzz 25   of `make test`
    python tools/torture.py --signals 8 --plant forgotten-evaluation   a fault is planted, which must be found

`main` makes a list of jobs, each a function that returns what it found, and `together` does them in forked processes,
as many at a time as there are cores. This process has imported everything, so that a run in a fork takes about a
second. Needs Linux; the full disks need user namespaces.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process whose OpenMP threads have run hangs
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

STEPS = 8
TIMES = {
    "time", "tokens_per_second", "memory_bytes", "train_runtime", "train_samples_per_second", "train_steps_per_second",
    "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
}  # fmt: skip
EXACT = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
ADAPTED = ["q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


# ------------------------------------------------------------------------------------------------- a run


def make_model(folder: Path) -> Path:
    """A Phi-3 of one narrow layer with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    from philora.models.loading import local_path

    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder)
    torch.manual_seed(0)
    nano = json.loads((Path(local_path("nano")) / "config.json").read_text(encoding="utf-8"))
    keys = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    config = Phi3Config(
        **{key: nano[key] for key in keys},
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        original_max_position_embeddings=256,
    )
    Phi3ForCausalLM(config).save_pretrained(folder)
    return folder


def settings_of(model: Path, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """A run with dropout, packing, accumulation, several epochs, slices, LoRA+ and evaluation in between."""
    return {
        "model": {"name_or_path": str(model), "dtype": dtype},
        "data": {"train": {"path": "helpdesk", "limit": 24}, "eval": {"path": "helpdesk", "limit": 4}},
        "evaluation": {"generate": 0},
        "training_config": {
            "output_dir": str(folder),
            "max_steps": STEPS,
            "max_length": 128,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "loraplus_lr_ratio": 4.0,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 1,
            "save_total_limit": 3,
            "log_level": "error",
        },
        "peft_config": {"r": 2, "lora_dropout": 0.1, "target_modules": ADAPTED},
    }


def run(settings: dict[str, Any], resume: bool | str, notes: Path) -> None:
    """Train in this process; `notes` gets the step that it begins with, and what went wrong."""
    import logging

    from transformers import TrainerCallback

    import philora

    class First(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with notes.open("a") as file:
                file.write(f"begins {state.global_step}\n")

    logging.disable(logging.CRITICAL)
    philora.train(settings, resume=resume, callbacks=[First()], command="torture")


def forked(work: Callable[[], None], notes: Path) -> int:
    """Do something in a child of this process; its exit code is 0, 1 for an error, or minus a signal's number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            work()
            code = 0
        except BaseException as error:  # noqa: BLE001 (the child says what it was, and ends)
            from philora.errors import PhiloraError

            with notes.open("a") as file:
                told = isinstance(error, PhiloraError)
                file.write(f"{type(error).__name__}: {error if told else traceback.format_exc()}\n")
                file.write(f"exit code {error.exit_code if told else 1}\n")
        finally:
            os._exit(code)
    return child


def until(there: Callable[[], object], seconds: float = 300) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            raise SystemExit("it did not come to be")
        time.sleep(0.001)


def ended(child: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path) -> dict[str, str]:
    """Return the results of a run without times: digests of its files, and its metrics."""
    last = folder / "checkpoints" / f"checkpoint-{STEPS}"
    files = {name: last / name for name in EXACT} | {"adapter": folder / "adapter" / "adapter_model.safetensors"}
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = json.dumps([{key: item[key] for key in item if key not in TIMES} for item in lines])
    state = json.loads((last / "trainer_state.json").read_text())
    history = [{key: item[key] for key in item if key not in TIMES} for item in state["log_history"]]
    found["history"] = json.dumps(history)
    results = json.loads((folder / "results.json").read_text())
    found["scores"] = json.dumps([results["before"], results["after"], results["train_loss"]])
    found["tokens"] = str(results["throughput"]["tokens"])
    return found


def unharmed(model: Path, folder: Path, notes: Path) -> dict[str, str]:
    """Return the results of an undisturbed run."""
    if ended(forked(lambda: run(settings_of(model, folder), False, notes), notes)):
        raise SystemExit(notes.read_text())
    return outcome(folder)


def differences(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """The names of what differs."""
    return [name for name in theirs if mine.get(name) != theirs[name]]


# ------------------------------------------------------------------------------------------------- kills


def staging(folder: Path) -> bool:
    """Return whether a checkpoint is being written, or was when its process ended: it has not yet got its name."""
    return any((folder / "checkpoints").glob(".saving-checkpoints/checkpoint-*"))


def phase_of(folder: Path) -> str:
    """Return the phase in which a run was killed, by its folder."""
    if staging(folder):
        return "while a checkpoint was written"
    if (folder / "adapter").is_dir() or (folder / "checkpoints" / f"checkpoint-{STEPS}").is_dir():
        return "after the last checkpoint"
    if (folder / "checkpoints").is_dir():
        return "in training"
    return "before the first checkpoint"


def killed_run(
    settings: dict[str, Any], folder: Path, notes: Path, chance: random.Random, seconds: float, while_saving: bool
) -> bool:
    """Start a run and kill it at a random moment; False when it was faster."""
    child = forked(lambda: run(settings, False, notes), notes)
    end = time.monotonic() + 20 * seconds
    if while_saving:
        turn = chance.randrange(1, STEPS)
        while not ((folder / "checkpoints" / f"checkpoint-{turn}").is_dir() and staging(folder)):
            if os.waitpid(child, os.WNOHANG)[0] or time.monotonic() > end:
                return False
            time.sleep(0.0002)
        time.sleep(chance.random() * 0.05 * min(seconds, 3.0))
    else:
        time.sleep(chance.uniform(0.02, 1.0) * seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def kills(count: int, saving: int, work: Path, chance: random.Random) -> dict[str, Any]:
    """Kill runs with SIGKILL, resume each, and compare its end with that of a run that was never killed.

    Goes on until there are `count` of them, and `saving` that were killed while a checkpoint was written. Every second
    run is aimed at that, and all once there are enough others; what counts is what the folder shows after the kill.
    """
    from philora.files.checkpoint import newest_complete

    model, whole, notes = make_model(work / "model"), work / "whole", work / "notes"
    begun = time.monotonic()
    expected = unharmed(model, whole, notes)
    seconds = time.monotonic() - begun
    phases: Counter[str] = Counter()
    wrong: list[str] = []
    item: list[str] = []
    number = 0
    while phases.total() < count or phases["while a checkpoint was written"] < saving:
        number += 1
        if number > 20 * count:
            raise SystemExit("runs end before they can be killed")
        folder, notes = work / f"run-{number}", work / f"notes-{number}"
        settings = settings_of(model, folder)
        aimed = number % 2 == 0 or phases.total() >= count
        if killed_run(settings, folder, notes, chance, seconds, while_saving=aimed):
            phase = phase_of(folder)
            phases[phase] += 1
            newest = newest_complete(folder / "checkpoints").folder
            step = 0 if newest is None else int(newest.name.partition("-")[2])
            notes.unlink(missing_ok=True)
            resume = (folder / "config.yaml").exists()
            code = ended(forked(lambda s=settings, r=resume, n=notes: run(s, r, n), notes))
            said = notes.read_text() if notes.exists() else ""
            item.append(f"{phase}, continues from step {step}")
            if code or f"begins {step}\n" not in said:
                wrong.append(f"{item[-1]}: {said}")
            elif differences(outcome(folder), expected):
                wrong.append(f"{item[-1]}: other {', '.join(differences(outcome(folder), expected))}")
        shutil.rmtree(folder, ignore_errors=True)
    return {"number": phases.total(), "seen": dict(phases), "each": item, "wrong": wrong}


# ------------------------------------------------------------------------------------------------- signals


def taken_up(settings: dict[str, Any], folder: Path, notes: Path, expected: dict[str, str]) -> str | None:
    """Give the command that the disk asks for: `--resume` where a checkpoint is whole, else the same one again.

    Returns:
        What is wrong: it is refused, begins elsewhere than at the newest checkpoint, or ends as another run.
    """
    from philora.files.checkpoint import newest_complete

    newest = newest_complete(folder / "checkpoints").folder
    step = 0 if newest is None else int(newest.name.partition("-")[2])
    done = newest is None and (folder / "results.json").exists()
    if done:
        return f"complete without a checkpoint: {sorted(item.name for item in folder.iterdir())}"
    notes.unlink(missing_ok=True)
    code = ended(forked(lambda: run(settings, newest is not None, notes), notes))
    said = notes.read_text() if notes.exists() else ""
    if code or f"begins {step}\n" not in said:
        return f"from step {step}: {said}"
    found = differences(outcome(folder), expected)
    return f"from step {step}: other {', '.join(found)}" if found else None


def signals(count: int, work: Path, chance: random.Random) -> dict[str, Any]:
    """Send SIGTERM or SIGINT, to every second run SIGKILL a moment later, as clusters do.

    A third of the signals comes at a random moment, a third about the first step, a third about an evaluation.

    The exit code and the words must say what is on the disk, and the command that they ask for must end as a run that
    nothing happened to.
    """
    from philora.files.checkpoint import newest_complete

    model, notes = make_model(work / "model"), work / "notes"
    begun = time.monotonic()
    expected = unharmed(model, work / "whole", notes)
    seconds = time.monotonic() - begun
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    number = 0
    while seen.total() < count and number < 20 * count:
        number += 1
        folder, notes = work / f"run-{number}", work / f"notes-{number}"
        settings = settings_of(model, folder)
        chosen = chance.choice([signal.SIGTERM, signal.SIGINT])
        child = forked(lambda s=settings, n=notes: run(s, False, n), notes)
        moment = AIMS[number % len(AIMS)]
        if moment is None:
            time.sleep(chance.uniform(0.02, 1.0) * seconds)
        else:
            end = time.monotonic() + 2 * seconds
            while not moment(folder) and time.monotonic() < end:
                time.sleep(0.0002)
            time.sleep(chance.uniform(0.0, 0.04) * seconds)
        os.kill(child, chosen)
        killed = number % 2 == 0
        if killed:
            time.sleep(chance.uniform(0.0, 0.1) * seconds)
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        said = notes.read_text() if notes.exists() else ""
        if code == 0 or (folder / "results.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            continue  # it was faster
        saved = newest_complete(folder / "checkpoints").folder is not None
        what = f"{chosen.name}{', then SIGKILL' if code < 0 else ''}, {'saved' if saved else 'nothing saved'}"
        seen[what] += 1
        if code == 1:
            right = f"exit code {3 if saved else 128 + chosen}\n" in said and ("--resume" in said) == saved
            if not said.splitlines()[-2:][0].startswith("Interrupted") or not right:
                wrong.append(f"{what}: {said}")
        found = taken_up(settings, folder, notes, expected)
        if found is not None:
            wrong.append(f"{what}: {found}")
        shutil.rmtree(folder, ignore_errors=True)
    return {"number": seen.total(), "seen": dict(seen), "wrong": wrong}


def waiting_for_evaluation(folder: Path) -> bool:
    """Return whether the third step is logged or saved, after which the run evaluates."""
    return (folder / "checkpoints" / "checkpoint-2").is_dir() and not (folder / "checkpoints" / "checkpoint-3").is_dir()


def begun_without_checkpoint(folder: Path) -> bool:
    """Return whether the run has written its record, which it does when the model is loaded, and has saved nothing."""
    return (folder / "run.json").is_file() and not any((folder / "checkpoints").glob("checkpoint-*"))


AIMS: tuple[Callable[[Path], bool] | None, ...] = (None, begun_without_checkpoint, waiting_for_evaluation)
"""When a run gets its signal, in turn; None: at a random moment."""


# ------------------------------------------------------------------------------------------------- races


def races(count: int, work: Path, chance: random.Random) -> dict[str, Any]:
    """Start two runs into one new folder; every second time the one that has it is killed and taken up."""
    model, notes = make_model(work / "model"), work / "notes"
    begun = time.monotonic()
    expected = unharmed(model, work / "whole", notes)
    seconds = time.monotonic() - begun
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(count):
        folder = work / f"new-{number}" / "run"
        settings = settings_of(model, folder)
        notes = [work / f"notes-{number}-{item}" for item in range(2)]
        children = []
        for note in notes:
            children.append(forked(lambda s=settings, n=note: run(s, False, n), note))
            time.sleep(
                chance.uniform(*chance.choice([(0.0, 0.02), (0.0, 0.3 * seconds), (0.3 * seconds, 0.8 * seconds)]))
            )
        if number % 2:
            time.sleep(chance.uniform(0.2, 0.9) * seconds)
            for child, note in zip(children, notes, strict=True):
                if not note.exists() or "exit code" not in note.read_text():
                    os.kill(child, signal.SIGKILL)
        codes = [ended(item) for item in children]
        said = [item.read_text() if item.exists() else "" for item in notes]
        refused = [item for item in said if "no other run is writing to" in item or "this one holds" in item]
        what = "one killed" if any(item < 0 for item in codes) else "one whole"
        seen[what] += 1
        if what == "one whole" and (sorted(codes) != [0, 1] or not refused or differences(outcome(folder), expected)):
            wrong.append(f"{codes}: {said}")
        elif what == "one whole" and not (folder / "config.yaml").is_file():
            wrong.append(f"{codes}: the run that was kept has lost its configuration")
        elif what == "one killed" and not (folder / "results.json").exists():
            found = taken_up(settings, folder, notes[0], expected)
            if found is not None:
                wrong.append(f"{codes}: {found}")
        shutil.rmtree(folder.parent, ignore_errors=True)
    return {"number": seen.total(), "seen": dict(seen), "wrong": wrong}


# ------------------------------------------------------------------------------------------------- foreign files


def foreign(count: int, work: Path, chance: random.Random) -> dict[str, Any]:
    """Put files of others into each checkpoint of a run that was stopped; damage the newest of every second one."""
    from philora.files.checkpoint import newest_complete

    model, notes = make_model(work / "model"), work / "notes"
    expected = unharmed(model, work / "whole", notes)
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    number = -1
    while seen.total() < count and number < 20 * count:
        number += 1
        folder, notes = work / f"run-{number}", work / f"notes-{number}"
        settings = settings_of(model, folder)
        child = forked(lambda s=settings, n=notes: run(s, False, n), notes)
        turn = chance.randrange(2, STEPS - 1)
        until((folder / "checkpoints" / f"checkpoint-{turn}").is_dir)
        os.kill(child, signal.SIGTERM)
        ended(child)
        if (folder / "results.json").exists():
            continue  # it was faster
        checkpoints = folder / "checkpoints"
        for item in checkpoints.glob("checkpoint-*"):
            name = chance.choice([".DS_Store", ".nfs00012", "notes.txt", "old/adapter.bin", "Thumbs.db", "a/b/c"])
            (item / name).parent.mkdir(parents=True, exist_ok=True)
            (item / name).write_bytes(b"foreign")
        (folder / ".DS_Store").write_bytes(b"foreign")
        newest = newest_complete(checkpoints).folder
        damaged = seen.total() % 2 == 1
        if damaged and newest is not None:
            (newest / "optimizer.pt").write_bytes(b"torn")
        found = taken_up(settings, folder, notes, expected)
        seen["newest damaged" if damaged else "newest whole"] += 1
        if newest is None or found is not None:
            wrong.append(f"{turn}: {found}")
        elif damaged and not any(checkpoints.glob(f"passed-over-{newest.name}")):
            wrong.append(f"{newest.name} was skipped and was removed")
        shutil.rmtree(folder, ignore_errors=True)
    return {"number": seen.total(), "seen": dict(seen), "wrong": wrong}


# ------------------------------------------------------------------------------------------------- planted faults


def plant(name: str) -> None:
    """Spoil one part of philora in this process and what it forks: the trials must find it."""
    from philora.files import checkpoint
    from philora.runtime import signals
    from philora.training import loop, resume, trainer

    if name == "refused-deletes":  # the second of two runs removes what the first has written
        take = resume.Claim.take

        def spoiled(self: Any, config: Any, held: Any) -> None:
            try:
                take(self, config, held)
            except Exception:
                for item in ("config.yaml", "train.log"):
                    (self.folder / item).unlink(missing_ok=True)
                raise

        resume.Claim.take = spoiled  # type: ignore[method-assign]
    elif name == "no-lock":
        checkpoint._lock = lambda descriptor: None
    elif name == "foreign-is-damage":
        faults_of = checkpoint.faults_of
        checkpoint.faults_of = lambda folder: [*faults_of(folder), *checkpoint.foreign_files(folder)]
    elif name == "passed-over-goes":
        checkpoint.set_aside = lambda path: (shutil.rmtree(path), path)[1]
    elif name == "forgotten-evaluation":  # one that a signal ended is not made again
        loop.ResumableLoop.pending_work = lambda self: {  # type: ignore[method-assign]
            "evaluation": False, "epoch_end": False, "grad_norm": None, "learning_rate": None
        }  # fmt: skip
    elif name == "always-3":  # the exit code says that something is saved
        signals.Interrupted.__init__ = lambda self, text, exit_code=3: (  # type: ignore[method-assign,assignment]
            signals.RunError.__init__(self, text), setattr(self, "exit_code", 3)
        )[0]  # fmt: skip
    elif name == "stays-blocked":  # a run that saved nothing takes its folder
        resume._saved_nothing = lambda folder, names: False
    elif name == "unsynced-step":  # a signal in a step ends it in the middle
        trainer.SFTTrainer._save_checkpoint = lambda self, model, trial: None  # type: ignore[method-assign]
    else:
        raise SystemExit(f"no such fault: {name}")


FAULTS = ("refused-deletes", "no-lock", "foreign-is-damage", "passed-over-goes", "forgotten-evaluation", "always-3",
          "stays-blocked", "unsynced-step")  # fmt: skip


# ------------------------------------------------------------------------------------------------- disks


CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000


def small_disk(folder: Path, size: int) -> None:
    """Mount an empty file system of so many bytes that only this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def one_disk(model: Path, work: Path, expected: dict[str, str], seed: int, report: Path) -> None:
    """A run on a file system that another process fills at a random moment; continues when there is room again."""
    from philora.files.checkpoint import bytes_in, faults_of

    chance = random.Random(seed)
    small = work / f"disk-{seed}"
    small.mkdir()
    notes = work / f"disk-notes-{seed}"
    small_disk(small, 24 << 20)
    folder = small / "run"
    settings = settings_of(model, folder)
    child = forked(lambda: run(settings, False, notes), notes)
    turn = chance.randrange(1, STEPS - 2)
    newest = folder / "checkpoints" / f"checkpoint-{turn}"
    aimed = chance.random() < 0.7
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if newest.is_dir() and (staging(folder) or not aimed):
            left = int(chance.random() * 0.9 * bytes_in(newest))
            filler = shutil.disk_usage(small).free - left
            try:
                with (small / "filler").open("wb") as file:
                    file.write(bytes(max(0, filler)))
            except OSError:
                pass  # full is what it is to be
            break
        time.sleep(0.0005)
    try:
        code = ended(child)
    except ChildProcessError:
        code = 0
    said = notes.read_text() if notes.exists() else ""
    checkpoints = sorted((folder / "checkpoints").glob("checkpoint-*"))
    torn = [item.name for item in checkpoints if faults_of(item)]
    found = {"code": code, "said": said, "torn": torn, "checkpoints": len(checkpoints), "differs": []}
    if code:
        (small / "filler").unlink()
        notes.unlink()
        again = ended(forked(lambda: run(settings, True, notes), notes))
        found["differs"] = [notes.read_text()] if again else differences(outcome(folder), expected)
    report.write_text(json.dumps(found))


def disks(count: int, work: Path, chance: random.Random) -> dict[str, Any]:
    """Runs on file systems that fill up while they train."""
    model = make_model(work / "model")
    expected = unharmed(model, work / "whole", work / "notes")
    wrong: list[str] = []
    tries = filled = 0
    while filled < count and tries < 5 * count:
        tries += 1
        seed, report = chance.randrange(2**31), work / f"disk-report-{tries}"
        log = work / f"disk-error-{tries}"
        child = forked(lambda s=seed, r=report: one_disk(model, work, expected, s, r), log)
        if ended(child) or not report.exists():
            return {"skipped": log.read_text()[-300:] if log.exists() else "no user namespaces here"}
        found = json.loads(report.read_text())
        if not found["code"]:
            continue  # it was done before the disk was full
        named = "expected free space" in found["said"] and "--resume" in found["said"]
        filled += 1
        if found["torn"] or found["differs"] or not named or not found["checkpoints"]:
            wrong.append(json.dumps({**found, "said": found["said"][-600:]}))
    return {"number": filled, "seen": {"ended and resumed": filled - len(wrong)}, "wrong": wrong}


# ------------------------------------------------------------------------------------------------- damage


def damage(work: Path, chance: random.Random, flips: int = 8) -> dict[str, Any]:
    """Truncate and change each file of a checkpoint in turn; `newest_complete` must name it every time."""
    from philora.files.checkpoint import foreign_files, newest_complete

    folder = work / "run"
    unharmed(make_model(work / "model"), folder, work / "notes")
    checkpoints = folder / "checkpoints"
    newest, older = checkpoints / f"checkpoint-{STEPS}", checkpoints / f"checkpoint-{STEPS - 1}"
    files = sorted(item for item in newest.rglob("*") if item.is_file())
    done, wrong = 0, []

    def check(path: Path, what: str) -> None:
        nonlocal done
        done += 1
        found = newest_complete(checkpoints)
        if found.folder != older or found.passed_over[0][0] != newest or path.name not in found.passed_over[0][1]:
            wrong.append(f"{path.name} {what}: {found}")

    for path in files:
        content = path.read_bytes()
        for length in sorted({0, 1, len(content) // 2, len(content) - 1} - {len(content)}):
            path.write_bytes(content[: max(0, length)])
            check(path, f"cut to {length} bytes")
        for _ in range(flips):
            changed = bytearray(content)
            place = chance.randrange(len(changed))
            changed[place] ^= 1 << chance.randrange(8)
            path.write_bytes(bytes(changed))
            check(path, f"bit of byte {place}")
        path.unlink()
        check(path, "removed")
        path.write_bytes(content)
    extra = newest / "optimizer.bin"
    extra.write_bytes(b"planted")
    done += 1
    if newest_complete(checkpoints) != (newest, []) or foreign_files(newest) != [extra.name]:
        wrong.append("a foreign file is not told, or makes the checkpoint damaged")
    extra.unlink()
    assert newest_complete(checkpoints).folder == newest
    return {"number": done, "seen": {"files": len(files)}, "wrong": wrong}


# ------------------------------------------------------------------------------------------------- fuzzing


class Hang(BaseException):
    """An input took longer than it may."""


def guarded(work: Callable[[], object], allowed: tuple[type[BaseException], ...], seconds: int = 10) -> str:
    """Feed one input; "read", "refused", or what must not happen."""

    def late(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
    except allowed:
        return "refused"
    except Hang:
        return f"no answer in {seconds} s: {traceback.format_exc(limit=-4)}"
    except MemoryError:
        return "memory"
    except Exception:  # noqa: BLE001 (what is looked for)
        return traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def odd_values() -> Any:
    """Values of every JSON kind, and the ones that break programs."""
    from hypothesis import strategies as st

    texts = st.one_of(
        st.text(max_size=30),
        st.sampled_from(
            ["", "\x00", "\ud800", "../../etc/passwd", "/dev/zero", "nan", "1e999", "auto", "null", "(a+)+$", "(",
             "*", "[", "{}", "{a.b}", "\u202e", "a" * 5000, "-1", "0x10", "~", "<|end|>", "user", "assistant"]
        ),
    )  # fmt: skip
    numbers = st.one_of(
        st.integers(),
        st.floats(),
        st.sampled_from([0, -1, 2**31, 2**63, 2**200, 10**30, float("nan"), float("inf"), 1e-320]),
    )
    leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.dictionaries(st.one_of(texts, st.sampled_from(["role", "content", "messages"])), inner, max_size=4),
        ),
        max_leaves=12,
    )


def changed_in(draw: Any, value: Any, odd: Any) -> Any:
    """The same value with one place of it, at any depth, replaced, removed or added to."""
    from hypothesis import strategies as st

    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        value = dict(value)
        key = draw(st.sampled_from(sorted(value, key=str)))
        choice = draw(st.integers(0, 9))
        if choice == 0:
            del value[key]
        elif choice == 1:
            value[draw(st.text(max_size=12))] = draw(odd)
        else:
            value[key] = changed_in(draw, value[key], odd)
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        value = list(value)
        place = draw(st.integers(0, len(value) - 1))
        value[place] = changed_in(draw, value[place], odd)
        return value
    return draw(odd)


def configs() -> Any:
    """Configuration files: changed ones, YAML's own corners, and noise."""
    import yaml
    from hypothesis import strategies as st

    base = settings_of(Path("nano"), Path("run"))
    base["model"]["name_or_path"] = "nano"
    tags = ["!!int x", "!!float []", "!!timestamp x", "!!binary '*'", "!!python/object:os.system x", "!!bool y",
            "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "&a [*a]", "&a {b: *a}", "<<: 1", "? [a]\n: b", "- - -",
            "2001-99-99", "0o9", "1:99:99", "@", "%YAML 9", "--- a\n--- b", "{<<: {<<: {}}}", "!!merge x", "!!null x",
            "!<tag:yaml.org,2002:int> ''", "!!str {a: b}", "!!seq a", "!!map []", "\t a", "'", "|9", ">-", "!", "*a",
            "[" * 2000, "{a: " * 500, "!!timestamp 2001-13-01", "9" * 5000, ".inf", "=", "!!value ="]  # fmt: skip

    @st.composite
    def drawn(draw: Any) -> bytes:
        kind = draw(st.integers(0, 5))
        if kind == 0:
            return draw(st.binary(max_size=200))
        if kind == 1:
            return draw(st.text(max_size=200)).encode("utf-8", "surrogatepass")
        if kind == 2:
            key = draw(st.sampled_from(["data", "model", "training_config", "peft_config", "evaluation", "x"]))
            inner = draw(st.sampled_from(["train", "name_or_path", "r", "seed", "target_modules"]))
            return f"{key}:\n  {inner}: {draw(st.sampled_from(tags))}\n".encode()
        if kind == 3:
            depth, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
            lines = ["a0: &a0 [x]"] + [
                f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, depth + 1)
            ]
            return "\n".join(
                [*lines, "data: {train: helpdesk}", f"peft_config: {{target_modules: *a{depth}}}"]
            ).encode()
        changed = base
        for _ in range(draw(st.integers(1, 3))):
            changed = changed_in(draw, changed, odd_values())
        try:
            text = yaml.dump(changed, allow_unicode=draw(st.booleans()))
        except (yaml.YAMLError, UnicodeEncodeError, ValueError):
            text = json.dumps(changed, default=str)
        content = bytearray(text.encode("utf-8", "surrogatepass"))
        if kind == 5 and content:
            place = draw(st.integers(0, len(content) - 1))
            content[place] = draw(st.integers(0, 255))
        return bytes(content)

    return drawn()


def datasets_() -> Any:
    """Data files with their suffix: changed records, torn files, noise."""
    import io

    import pyarrow as pa
    from hypothesis import strategies as st
    from pyarrow import parquet

    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    shapes = [
        chat,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"text": "a b"},
        {**chat, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, *chat["messages"][1:]]},
    ]

    @st.composite
    def drawn(draw: Any) -> tuple[str, bytes]:
        odd = odd_values()
        records = []
        for _ in range(draw(st.integers(1, 4))):
            record: Any = draw(st.sampled_from(shapes))
            for _ in range(draw(st.integers(0, 2))):
                record = changed_in(draw, record, odd)
            records.append(record)
        suffix = draw(st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]))
        lines = [json.dumps(item, ensure_ascii=draw(st.booleans())) for item in records]
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return suffix, draw(st.binary(max_size=300))
        if kind == 1:
            return suffix, b"[" * draw(st.sampled_from([10, 1000, 100_000]))
        if suffix == ".parquet":
            try:
                sink = io.BytesIO()
                parquet.write_table(pa.Table.from_pylist([r for r in records if isinstance(r, dict)]), sink)
                content = bytearray(sink.getvalue())
            except (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeEncodeError):
                content = bytearray(b"PAR1")
        elif suffix == ".json":
            whole = draw(st.sampled_from([f"[{', '.join(lines)}]", f'{{"data": [{", ".join(lines)}]}}', lines[0]]))
            content = bytearray(whole.encode("utf-8", "surrogatepass"))
        elif suffix in (".csv", ".tsv"):
            rows = [",".join(json.dumps(str(v)) for v in r.values()) for r in records if isinstance(r, dict)]
            content = bytearray("\n".join(["instruction,input,output", *rows]).encode("utf-8", "surrogatepass"))
        else:
            content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
        if suffix.endswith(".gz"):
            content = bytearray(gzip.compress(bytes(content)))
        if kind in (2, 3) and content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        if kind == 4:
            del content[draw(st.integers(0, len(content))) :]
        return suffix, bytes(content)

    return drawn()


def adapters(folder: Path) -> Any:
    """Adapter folders: each file changed in what it says or in its bytes, hostile headers, files that are missing."""
    from hypothesis import strategies as st

    files = {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}
    config = json.loads(files["adapter_config.json"])
    record = json.loads(files["philora.json"])
    weights = files["adapter_model.safetensors"]
    length = int.from_bytes(weights[:8], "little")
    header, body = json.loads(weights[8 : 8 + length]), weights[8 + length :]

    @st.composite
    def drawn(draw: Any) -> dict[str, bytes | None]:
        odd = odd_values()
        changed: dict[str, bytes | None] = {}
        kind = draw(st.integers(0, 7))
        if kind in (0, 1, 2):
            value = config
            for _ in range(draw(st.integers(1, 2))):
                value = changed_in(draw, value, odd)
            changed["adapter_config.json"] = json.dumps(value).encode()
        elif kind == 3:
            changed["philora.json"] = json.dumps(changed_in(draw, record, odd)).encode()
        elif kind == 4:
            text = json.dumps(changed_in(draw, header, odd)).encode()
            changed["adapter_model.safetensors"] = len(text).to_bytes(8, "little") + text + body
        elif kind == 5:
            size = draw(st.sampled_from([0, 7, 2**31, 2**40, 2**63 - 1, 2**64 - 1, len(weights), 100_000_001]))
            changed["adapter_model.safetensors"] = size.to_bytes(8, "little") + weights[8:]
        elif kind == 6:
            name = draw(st.sampled_from(sorted(files)))
            content = bytearray(files[name])
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
            changed[name] = bytes(content)
        else:
            name = draw(st.sampled_from(["adapter_config.json", "philora.json", "adapter_model.safetensors"]))
            content = files[name]
            changed[name] = draw(
                st.one_of(st.none(), st.binary(max_size=100), st.just(content[: draw(st.integers(0, len(content)))]),
                          st.just(b"[" * 100_000), st.just(b'{"a":' * 50_000))
            )  # fmt: skip
        return changed

    return drawn()


def fuzz(kind: str, count: int, work: Path, seed: int) -> dict[str, Any]:
    """Feed inputs to one reader, in this process, whose memory is bounded from here on."""
    import logging

    import hypothesis

    logging.disable(logging.CRITICAL)
    feed, strategy = READERS[kind](work)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 30), resource.RLIM_INFINITY))
    seen: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(value: Any) -> None:
        result = feed(value)
        if result in ("read", "refused"):
            seen[result] += 1
            return
        seen["wrong"] += 1
        wrong.setdefault(result.strip().splitlines()[-1] if result.strip() else result, f"{value!r:.600}\n{result}")

    number = 0
    while seen.total() < count:
        number += 1  # in parts: hypothesis varies what it has drawn, and draws anew in the next
        settings = hypothesis.settings(
            max_examples=min(250, count - seen.total()),
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed * 1000 + number)(settings(hypothesis.given(strategy)(one)))()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"number": seen.total(), "seen": dict(seen), "grown_bytes": grown, "wrong": list(wrong.values())}


def config_reader(folder: Path) -> tuple[Callable[[bytes], str], Any]:
    """Feeds files to `load_config`."""
    from philora.configuration.config import load_config
    from philora.errors import ConfigError

    path = folder / "config.yaml"

    def feed(content: bytes) -> str:
        path.write_bytes(content)
        return guarded(lambda: load_config(path).to_dict(), (ConfigError,))

    return feed, configs()


def data_reader(folder: Path) -> tuple[Callable[[tuple[str, bytes]], str], Any]:
    """Feeds files to the data reader, up to normalised conversations."""
    from philora.configuration.sections import SourceConfig
    from philora.dataset.read import resolve
    from philora.dataset.store import Settings, process_batch, recognised
    from philora.errors import DataError

    def read(path: Path) -> None:
        source, shape = recognised(resolve(SourceConfig(str(path)), "train"), None)
        for batch in source.open():
            process_batch(batch, shape, None, Settings(64, False), tokenise=False)  # type: ignore[arg-type]

    def feed(value: tuple[str, bytes]) -> str:
        path = folder / f"data{value[0]}"
        path.write_bytes(value[1])
        return guarded(lambda: read(path), (DataError,))

    return feed, datasets_()


def adapter_reader(folder: Path) -> tuple[Callable[[dict[str, bytes | None]], str], Any]:
    """Feeds folders to `load_adapter`."""
    import torch
    from peft import LoraConfig
    from transformers import Phi3Config, Phi3ForCausalLM

    import philora
    from philora.errors import AdapterError, TargetError

    base = Phi3Config(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, original_max_position_embeddings=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    good, folder = folder / "good", folder / "changed"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    philora.get_peft_model(Phi3ForCausalLM(base), config).save_pretrained(str(good))
    names = [item.name for item in good.iterdir() if item.is_file()]

    def read() -> None:
        philora.load_adapter(Phi3ForCausalLM(base), folder)

    def feed(changed: dict[str, bytes | None]) -> str:
        folder.mkdir(exist_ok=True)
        for name in names:
            content = changed.get(name, (good / name).read_bytes())
            if content is None:
                (folder / name).unlink(missing_ok=True)
            else:
                (folder / name).write_bytes(content)
        return guarded(read, (AdapterError, TargetError))

    return feed, adapters(good)


READERS: dict[str, Callable[[Path], tuple[Callable[[Any], str], Any]]] = {
    "config": config_reader,
    "data": data_reader,
    "adapter": adapter_reader,
}


# ------------------------------------------------------------------------------------------------- together


Job = tuple[str, Callable[[Path], dict[str, Any]]]
"""What a job is part of, and what it does in a folder of its own."""


def together(jobs: list[Job], work: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Do jobs in forked processes, so many at a time; what those of one name have found is added up."""
    waiting = [(name, job, work / str(number)) for number, (name, job) in enumerate(jobs)]
    results: dict[str, dict[str, Any]] = {name: {} for name, _ in jobs}
    running: dict[int, tuple[str, Path]] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            name, job, folder = waiting.pop(0)
            folder.mkdir()
            report = folder / "report.json"
            child = forked(lambda j=job, f=folder, r=report: r.write_text(json.dumps(j(f))), folder / "error")
            running[child] = name, folder
        child, status = os.wait()
        name, folder = running.pop(child)
        if status == 0:
            found = json.loads((folder / "report.json").read_text())
        else:
            said = (folder / "error").read_text() if (folder / "error").exists() else ""
            found = {"number": 0, "wrong": [f"ended with {os.waitstatus_to_exitcode(status)}: {said}"]}
        results[name] = added(results[name], found)
        print(f"{name}: {results[name].get('number', 0):,}", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return results


def added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the joined results of two jobs of one name."""
    both = {**one, **other}
    for key in one.keys() & other.keys():
        if key == "grown_bytes":
            both[key] = max(one[key], other[key])
        elif isinstance(one[key], dict):
            both[key] = added(one[key], other[key])
        elif not isinstance(one[key], str):
            both[key] = one[key] + other[key]
    return both


def shared(count: int, parts: int) -> list[int]:
    """A number in so many parts, none of them 0."""
    return [share for n in range(parts) if (share := (count * (n + 1)) // parts - (count * n) // parts)]


# ------------------------------------------------------------------------------------------------- summary


BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The summary as Markdown."""
    yield "| trial | number | what was seen | wrong |"
    yield "| --- | --- | --- | --- |"
    for name, found in results.items():
        if "skipped" in found:
            yield f"| {name} | 0 | not run: {found['skipped']} | - |"
            continue
        seen = dict(found.get("seen", {}))
        if "grown_bytes" in found:
            seen["memory grew by MB"] = found["grown_bytes"] // 10**6
        text = ", ".join(f"{key}: {value:,}" for key, value in sorted(seen.items()))
        yield f"| {name} | {found['number']:,} | {text} | {len(found['wrong'])} |"


def write_summary(path: Path, results: dict[str, dict[str, Any]], seed: int) -> None:
    """Put the table between the marks of a page, with the commit that it is of."""
    head, rest = path.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    rows = "\n".join(table(results))
    path.write_text(f"{head}{BEGIN}\n\n{rows}\n\nSeed {seed}, commit {commit}.\n\n{END}{tail}", encoding="utf-8")


def main() -> int:
    """Run what was asked for, print it as JSON, and return 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="runs that are killed")
    parser.add_argument("--saving", type=int, default=0, help="of them at least so many while a checkpoint is written")
    parser.add_argument("--signals", type=int, default=0, help="runs that get SIGTERM or SIGINT")
    parser.add_argument("--races", type=int, default=0, help="pairs of runs that begin in one new folder")
    parser.add_argument("--foreign", type=int, default=0, help="runs whose checkpoints get foreign files")
    parser.add_argument("--plant", choices=FAULTS, help="spoil philora first: the trials must find it")
    parser.add_argument("--disks", type=int, default=0, help="runs on a file system that fills up")
    parser.add_argument("--damage", action="store_true", help="damage each file of a checkpoint")
    parser.add_argument("--fuzz", type=int, default=0, help="inputs of each reader")
    parser.add_argument("--all", action="store_true", help="all of it, as docs/reliability.md shows")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="page whose table is written again")
    given = parser.parse_args()
    if given.all:
        given.kills, given.saving, given.disks, given.damage, given.fuzz = 200, 60, 20, True, 10_000
        given.signals, given.races, given.foreign = 200, 100, 50
    jobs: list[Job] = []
    for part, count in enumerate(shared(given.kills, 4)):
        saving = -(-given.saving * count // given.kills)
        chance = random.Random(f"kill {given.seed} {part}")
        jobs.append(("killed with SIGKILL, resumed", lambda w, n=count, s=saving, c=chance: kills(n, s, w, c)))
    trials = (
        ("stopped with SIGTERM or SIGINT", given.signals, signals),
        ("two runs in one folder", given.races, races),
        ("foreign files in checkpoints", given.foreign, foreign),
    )
    for name, number, trial in trials:
        for part, count in enumerate(shared(number, 4 if number > 8 else 1)):
            chance = random.Random(f"{name} {given.seed} {part}")
            jobs.append((name, lambda w, t=trial, n=count, c=chance: t(n, w, c)))
    for part, count in enumerate(shared(given.disks, 4)):
        chance = random.Random(f"disk {given.seed} {part}")
        jobs.append(("file system filled up", lambda w, n=count, c=chance: disks(n, w, c)))
    if given.damage:
        jobs.append(("checkpoint files damaged", lambda w: damage(w, random.Random(given.seed))))
    for kind in READERS if given.fuzz else ():
        for part, count in enumerate(shared(given.fuzz, 4 if given.fuzz > 1000 else 1)):
            seed = 10 * given.seed + part
            jobs.append((f"{kind} reader fuzzed", lambda w, k=kind, n=count, s=seed: fuzz(k, n, w, s)))
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        work = Path(place)
        os.environ["PHILORA_CACHE"] = str(work / "cache")
        import philora.training.run  # noqa: F401 (what every forked run needs)

        if given.plant:
            plant(given.plant)
        gc.collect()
        gc.freeze()  # a collection in a forked run need not look at what was imported
        results = together(jobs, work, given.processes)
    print(json.dumps(results, indent=2))
    if given.write:
        write_summary(given.write, results, given.seed)
    return int(any(item.get("wrong") for item in results.values()))


if __name__ == "__main__":
    sys.exit(main())
