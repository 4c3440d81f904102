"""Training of the full Phi-3-mini shape on one CUDA GPU: philora beside TRL, a plain loop and, where there, others.

`python -m benchmarks.gpu [--only PATTERN,...] [--long] [--rounds N] [--steps N] [--minutes M]`

A case is a contestant, a base (bf16, NF4, or for philora products in fp8), packs of 2048 or 8192 tokens (with `--long`
also 16384), activations kept or recomputed, and on request LoRA dropout and, for philora, a CUDA graph. `--only` picks
cases by their names, in its order. Neighbours of one contestant share a process, which makes the weights on the device
anew for each. None is begun when the time is nearly over. Rows go to results/gpu.csv, also of a case that failed: it
says why. At the end philora's best case stands beside the best case of all others, whatever their packs and settings.
On a GPU the command fails where philora's decoder layers ran in another way than the case asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

from rich.console import Console
from rich.table import Table

from benchmarks.contestants import LORA, PACKAGES, TRAINER, dataset_of, facts_of
from benchmarks.paths import watched
from benchmarks.process import REPOSITORY, Record, environment, start
from benchmarks.rate import layers_rate
from benchmarks.results import RESULTS, append, commit, now
from benchmarks.training import Runs, disagreements, largest_gap
from benchmarks.work import IGNORED, WORKS, Document, Work, config_of, default_root, make_rows

MINI = Work("mini", "Phi-3-mini, random weights", 3072, 8192, 32, 32, longest_tokens=2048)
REFERENCE = "trl"
"""Losses are compared with its."""

OK = "ok"
KEPT = {"keep": "none", "elementwise": "elementwise", "recompute": "full", "host": "host"}
"""What a case keeps for backward, and the planner's word for it; `elementwise` and `host` are philora's alone."""
DROPOUT = 0.05
"""LoRA dropout where a case has some: the model card's and philora's default."""
BASES = ("bf16", "fp8", "nf4")
SKIPPED = "not started: the time was nearly over"


@dataclass(frozen=True)
class Contestant:
    """Describe a contestant.

    Attributes:
        needs: Modules without which there is no such contestant.
        attention: What the model is asked for.
        autocast: To bf16, over bf16 weights.
        bases: What it can train over.
    """

    title: str
    train: Callable[[Any, list[list[Document]], Settings], tuple[Measured, Any]]
    needs: tuple[str, ...] = ()
    attention: str = "sdpa"
    autocast: bool = True
    bases: tuple[str, ...] = ("bf16", "nf4")


@dataclass(frozen=True)
class Case:
    """Describe a row of the table."""

    contestant: str
    base: str
    tokens: int
    kept: str = "keep"
    dropout: float = 0.0
    graphs: bool = False

    @property
    def name(self) -> str:
        """Return the name for `--only`."""
        extras = ("+dropout" if self.dropout else "") + ("+graphs" if self.graphs else "")
        return f"{self.contestant}/{self.base}/{self.tokens}/{self.kept}{extras}"

    @property
    def recompute(self) -> bool:
        """Return whether complete layers are recomputed."""
        return self.kept in ("recompute", "host")

    @property
    def switches(self) -> dict[str, str]:
        """Variables of the environment that turn on what is off until a card has run it."""
        stack = {"PHILORA_STACK": "all"} if self.dropout or self.kept == "host" else {}
        return stack | ({"PHILORA_GRAPHS": "all"} if self.graphs else {})


@dataclass(frozen=True)
class Settings:
    """Hold the task of a contestant's process, without its cases.

    Attributes:
        seconds: No case is begun when the longest so far would not fit into them any more.
    """

    work: Work
    device: str
    warmup: int
    steps: int
    seconds: float
    seed: int = 0
    learning_rate: float = 1e-3


def flops_per_token(work: Work, lengths: Sequence[int], label_share: float, recompute: bool) -> float:
    """All products of a step over its tokens: 4N, with recomputation 6N, causal attention and the adapters.

    N counts the linear layers and, for tokens with a label, the head. Attention of a document of L tokens is 2 L^2 C
    FLOPs a layer forward (half of the scores are needed) and 2.5 times that backward, where the scores are made again.
    The adapters have no second forward pass in it.

    Args:
        work: The shape.
        lengths: Of the documents.
        label_share: Labelled tokens among all.
        recompute: Whether the forward pass is computed again.
    """
    products = work.flops_per_token(label_share) * (1.5 if recompute else 1.0)
    attention = 2.0 * work.hidden * work.layers * sum(item**2 for item in lengths) / sum(lengths)
    adapters = LORA["r"] * work.layers * sum(rows + columns for rows, columns in work.layer_shapes)
    return products + attention * (4.5 if recompute else 3.5) + 6.0 * adapters


# ------------------------------------------------------------------------------------- the process of a contestant


class Measured:
    """The steps of a training: nothing here waits for the device before the training is over."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []
        self.losses: list[Any] = []
        self.labels: list[Any] = []
        self.tokens: list[int] = []

    def begin(self) -> None:
        """The first step begins; what making the model took does not count for the peak of memory."""
        release(self.device)
        self.mark()

    def mark(self) -> None:
        """A step ends here, and the next begins."""
        import torch

        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def batch(self, labels: Any, tokens: int) -> None:
        """A forward and backward pass begins, on these labels and so many tokens."""
        self.labels.append((labels[:, 1:] != IGNORED).sum())
        self.tokens.append(tokens)

    def record(self, warmup: int) -> Record:
        """The same as the training benchmark keeps it."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        seconds = [first.elapsed_time(last) / 1e3 if self.device == "cuda" else last - first for first, last in pairs]
        losses, labels = [float(item) for item in self.losses], [int(item) for item in self.labels]
        return Record(warmup, losses, labels, self.tokens, seconds)


def make_model(work: Work, base: str, attention: str, settings: Settings) -> Any:
    """The model on the device; weights depend on their names alone, so that all contestants have the same.

    NF4 is as transformers makes it: every linear layer but the head, double quantisation, bf16 products.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config_of(work), dtype=torch.bfloat16, attn_implementation=attention)
    generator = torch.Generator(settings.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                generator.manual_seed(work.seed + crc32(name.encode()))
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(1.0)
    if base == "nf4":
        import bitsandbytes as bnb

        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                sizes = module.in_features, module.out_features
                four = bnb.nn.Linear4bit(
                    *sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
                )
                weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=four)
                four.weight = weight.to(settings.device)  # quantises
                model.set_submodule(name, four)
        model.is_loaded_in_4bit = True  # PEFT and TRL ask
    return model


def seeded_adapter(dropout: float = 0.0) -> Any:
    """The adapter's configuration; what draws A next draws the same for all."""
    import transformers
    from peft import LoraConfig

    transformers.set_seed(0)
    return LoraConfig(lora_dropout=dropout, **LORA)


def by_trainer(module: str) -> Callable[[Case, list[list[Document]], Settings], tuple[Measured, Any]]:
    """A training by the SFTTrainer of a module.

    Args:
        module: `trl` or `philora`.
    """

    def train(case: Case, rows: list[list[Document]], settings: Settings) -> tuple[Measured, Any]:
        library = __import__(module)
        chosen = CONTESTANTS[case.contestant]
        model = make_model(settings.work, case.base, chosen.attention, settings)
        return run_trainer(library, model, seeded_adapter(case.dropout), case, rows, settings)

    return train


def run_trainer(
    library: Any,
    model: Any,
    adapter: Any,
    case: Case,
    rows: list[list[Document]],
    settings: Settings,
    callbacks: Sequence[Any] = (),
) -> tuple[Measured, Any]:
    """Train with a library's SFTTrainer, given a model and the adapter it is to make, or an adapted model."""
    from transformers import AutoTokenizer, TrainerCallback

    from philora.models.loading import local_path

    measured = Measured(settings.device)

    class Watched(library.SFTTrainer):  # type: ignore[misc,name-defined]
        """The trainer, with a note of what each forward pass is given and gives."""

        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            measured.batch(inputs["labels"], inputs["input_ids"].numel())
            loss = super().training_step(model, inputs, *rest, **more)
            measured.losses.append(loss.detach())
            return loss

    class Steps(TrainerCallback):  # type: ignore[misc]
        """Marks where steps begin and end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            measured.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            measured.mark()

    autocast = CONTESTANTS[case.contestant].autocast
    with tempfile.TemporaryDirectory() as folder:
        arguments = library.SFTConfig(
            folder,
            max_steps=len(rows),
            gradient_accumulation_steps=1,
            learning_rate=settings.learning_rate,
            optim="adamw_torch_fused",
            bf16=autocast,
            use_cpu=settings.device == "cpu",
            seed=settings.seed,
            gradient_checkpointing={"keep": False, "recompute": True}.get(case.kept, case.kept),
            max_length=case.tokens,
            logging_strategy="no",
            logging_nan_inf_filter=False,  # it waits for the device in every step
            **TRAINER,
        )
        trainer = Watched(
            model,
            args=arguments,
            train_dataset=dataset_of([rows]),
            processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
            peft_config=adapter,
            callbacks=[Steps(), *callbacks],
        )
        if case.base == "fp8":
            from philora.decoder_stack.model import configure

            configure(trainer.model, fp8=True)
        if library.__name__ == "philora":  # as `philora train` does over a quantised base; TRL rounds them to bf16
            for parameter in trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        trainer.train()
        return measured, trainer.model


def by_loop(case: Case, rows: list[list[Document]], settings: Settings) -> tuple[Measured, Any]:
    """A plain loop over transformers' model with PEFT's adapter."""
    import numpy as np
    import peft
    import torch

    chosen = CONTESTANTS[case.contestant]
    base = make_model(settings.work, case.base, chosen.attention, settings)
    model = peft.get_peft_model(base, seeded_adapter(case.dropout))
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    parameters = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    measured = Measured(settings.device)
    measured.begin()
    for row in rows:
        columns = {
            "input_ids": [item.input_ids for item in row],
            "position_ids": [np.arange(len(item.input_ids)) for item in row],
            "labels": [item.labels for item in row],
        }
        batch = {
            name: torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(settings.device)
            for name, parts in columns.items()
        }
        measured.batch(batch["labels"], batch["input_ids"].numel())
        with torch.autocast(settings.device, torch.bfloat16, enabled=chosen.autocast):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured.losses.append(loss.detach())
        measured.mark()
    return measured, model


def by_liger(case: Case, rows: list[list[Document]], settings: Settings) -> tuple[Measured, Any]:
    """The plain loop with Liger's kernels in transformers' Phi-3."""
    from liger_kernel.transformers import apply_liger_kernel_to_phi3

    apply_liger_kernel_to_phi3()
    return by_loop(case, rows, settings)


@cache
def written_model(settings: Settings) -> tempfile.TemporaryDirectory[str]:
    """A folder with the bf16 model, for a library that reads models from folders only; kept while the process lives."""
    from transformers import AutoTokenizer

    from philora.models.loading import local_path

    folder = tempfile.TemporaryDirectory()
    make_model(settings.work, "bf16", "sdpa", settings).save_pretrained(folder.name)
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder.name)
    release(settings.device)
    return folder


def by_unsloth(case: Case, rows: list[list[Document]], settings: Settings) -> tuple[Measured, Any]:
    """Unsloth's model in TRL's trainer, which Unsloth patches."""
    from unsloth import FastModel

    # isort: split
    import trl  # after what patches it

    recompute = "unsloth" if case.recompute else False
    model, _ = FastModel.from_pretrained(
        written_model(settings).name,
        max_seq_length=case.tokens,
        load_in_4bit=case.base == "nf4",
        load_in_16bit=case.base == "bf16",
        use_gradient_checkpointing=recompute,
        use_exact_model_name=True,
    )
    wanted = {name: value for name, value in LORA.items() if name != "task_type"}
    adapted = FastModel.get_peft_model(
        model, lora_dropout=case.dropout, use_gradient_checkpointing=recompute, random_state=settings.seed, **wanted
    )
    return run_trainer(trl, adapted, None, case, rows, settings)


CONTESTANTS = {
    "philora": Contestant("philora.SFTTrainer", by_trainer("philora"), autocast=False, bases=BASES),
    "trl": Contestant("TRL SFTTrainer + PEFT", by_trainer("trl")),
    "trl-pure": Contestant("TRL + PEFT, no autocast", by_trainer("trl"), autocast=False),
    "plain": Contestant("plain loop, PEFT", by_loop),
    "liger": Contestant("plain loop, PEFT, Liger", by_liger, ("liger_kernel",)),
    "unsloth": Contestant("TRL SFTTrainer, Unsloth", by_unsloth, ("unsloth",)),
    "trl-flash": Contestant("TRL + PEFT, FlashAttention 2", by_trainer("trl"), ("flash_attn",), "flash_attention_2"),
}


def release(device: str) -> None:
    """Give back what nobody holds any more, and count the peak anew."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    """Train one case and return its figures."""
    import torch

    work = replace(settings.work, row_tokens=case.tokens)
    rows = make_rows(work)[: settings.warmup + settings.steps]
    if len(rows) < settings.warmup + settings.steps:
        raise ValueError(f"steps={settings.steps} - expected at most {len(rows) - settings.warmup}.")
    before = torch.cuda.memory_allocated() if settings.device == "cuda" else 0
    # Unsloth wants to be imported before transformers, which philora imports.
    ours = case.contestant == "philora"
    with switched(case.switches), watched() if ours else nullcontext() as taken:
        measured, model = CONTESTANTS[case.contestant].train(case, rows, settings)
    packages = [*PACKAGES, *(["bitsandbytes"] if case.base == "nf4" else [])]
    extra = {"liger": ["liger-kernel"], "unsloth": ["unsloth"], "trl-flash": ["flash-attn"]}
    facts = {"autocast": CONTESTANTS[case.contestant].autocast, "dropout": case.dropout, **facts_of(model)}
    facts |= {"allocated_before": before, **case.switches}
    result = measured.record(settings.warmup).result(facts, [*packages, *extra.get(case.contestant, [])])
    timed = [len(item.input_ids) for row in rows[settings.warmup :] for item in row]
    share = sum(result["labels"][settings.warmup :]) / sum(timed)
    result["flops_per_token"] = flops_per_token(settings.work, timed, share, case.recompute)
    if settings.device == "cuda":
        result["max_memory_allocated"] = torch.cuda.max_memory_allocated()
        result["max_memory_reserved"] = torch.cuda.max_memory_reserved()
    if taken is not None:
        result["path"] = str(taken)
        if settings.device == "cuda":
            result["fault"] = taken.fault(case.base == "fp8", case.graphs)
            result["planned_memory_allocated"] = planned_bytes(
                case, settings.work, share, stack=taken.by_stack, graph=taken.replayed > 0
            )
    return result


@contextmanager
def switched(switches: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment within the block."""
    before = {name: os.environ.get(name) for name in switches}
    os.environ |= switches
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def planned_bytes(case: Case, work: Work, label_share: float, *, stack: bool = True, graph: bool = False) -> int:
    """Return philora's estimate of `max_memory_allocated`.

    Args:
        case: Of philora.
        work: The shape.
        label_share: Labelled tokens among all.
        stack: Whether the decoder stack computes the layers.
        graph: Whether it does so in a CUDA graph.
    """
    counted = replace(_footprint(case.base, case.dropout, work, stack), graph=graph)
    estimate = counted.estimate(case.tokens, KEPT[case.kept], label_share=label_share)
    return estimate.training - estimate.heap  # what the allocator reserves and nobody has is not allocated


@cache
def _footprint(base: str, dropout: float, work: Work, stack: bool) -> Any:
    """The planner's count of a model without weights."""
    import torch
    from transformers import Phi3ForCausalLM

    import philora
    from philora.configuration.sections import ModelConfig
    from philora.planning.footprint import footprint

    state = torch.get_rng_state()
    with torch.device("meta"):
        model = philora.get_peft_model(Phi3ForCausalLM(config_of(work)), seeded_adapter(dropout))
    torch.set_rng_state(state)
    asked = ModelConfig(
        dtype="bfloat16",
        quantization="nf4" if base == "nf4" else "none",
        base_products="fp8" if base == "fp8" else None,
    )
    return footprint(model, asked, "adamw_torch_fused", "cuda", stack=stack)


def contestant(cases: list[Case], settings: Settings, out: Path) -> None:
    """The body of a contestant's process: `out` holds what is done, after each case."""
    import torch

    done: dict[str, dict[str, Any]] = {}
    begun, longest = time.monotonic(), 0.0
    for case in cases:
        at = time.monotonic()
        if at - begun + longest > settings.seconds:
            result: dict[str, Any] = {"status": SKIPPED}
        else:
            release(settings.device)
            try:
                result = {"status": OK, **measure_case(case, settings)}
            except torch.OutOfMemoryError as error:
                result = {"status": f"out of memory: {str(error).splitlines()[0]}"}
            except Exception as error:  # noqa: BLE001 - whatever another library raises is the row's reason
                lines = [*str(error).strip().splitlines(), ""]
                result = {"status": f"{type(error).__name__}: {lines[0]}"[:300]}
            longest = max(longest, time.monotonic() - at)
        done[case.name] = result
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(done), encoding="utf-8")
        temporary.replace(out)


def rates(device: str, works: list[Work]) -> dict[str, Any]:
    """Describe the machine, and its rate of products at each length of packs.

    Raises:
        RuntimeError: There is no such device.
    """
    import torch

    from benchmarks.machine import describe

    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device: cuda - expected a CUDA GPU that torch can use. Try --device cpu --quick.")
    facts = describe(device)
    name = str(facts.get("accelerator") or f"{facts['cores']} cores {facts['arch']} {facts['capabilities']}")
    return {"device": name, "rates": {str(item.row_tokens): layers_rate(item, device) for item in works}}


def child(line: Sequence[str]) -> None:
    """`KIND TASK OUT`: what one of the processes does."""
    kind, text, out = line[0], json.loads(line[1]), Path(line[2])
    if kind == "rates":
        works = [Work(**item) for item in text["works"]]
        out.write_text(json.dumps(rates(text["device"], works)), encoding="utf-8")
    else:
        settings = Settings(**text["settings"] | {"work": Work(**text["settings"]["work"])})
        contestant([Case(**item) for item in text["cases"]], settings, out)


# ------------------------------------------------------------------------------------------------------ the command


def cases_of(name: str, tokens: Sequence[int]) -> Iterator[Case]:
    """All cases of a contestant; what philora alone has is asked of philora alone."""
    ours = name == "philora"
    for base in BASES:
        if base not in CONTESTANTS[name].bases:
            continue
        for kept in KEPT:
            if not ours and kept not in ("keep", "recompute"):
                continue
            for dropout in (0.0, DROPOUT):
                for graphs in (False, True) if ours and kept != "host" else (False,):
                    yield from (Case(name, base, count, kept, dropout, graphs) for count in tokens)


def groups(only: Sequence[str], tokens: Sequence[int]) -> Iterator[list[Case]]:
    """The cases of each process: those of each pattern in turn, and neighbours of one contestant together."""
    known = [case for name in CONTESTANTS for case in cases_of(name, tokens)]
    picked = dict.fromkeys(case for pattern in only for case in known if fnmatch(case.name, pattern))
    for _, cases in groupby(picked, key=lambda case: case.contestant):
        yield list(cases)


def missing(name: str) -> str | None:
    """Why there is no such contestant here."""
    absent = [item for item in CONTESTANTS[name].needs if find_spec(item) is None]
    return f"not importable: {', '.join(absent)}" if absent else None


def reference_of(case: Case, contestant: str) -> Case:
    """The case that a case's losses are compared with: another's at the same packs, in bf16 where products are fp8.

    What is kept changes no loss, and dropout draws other masks: the reference keeps everything and has no dropout.
    """
    kept = case.kept if case.kept == "recompute" else "keep"
    return Case(contestant, "bf16" if case.base == "fp8" else case.base, case.tokens, kept)


def row_of(
    case: Case,
    number: int,
    result: dict[str, Any],
    facts: dict[str, Any],
    given: argparse.Namespace,
    reference: dict[str, Any] | None = None,
) -> dict[str, str | int | float]:
    """Return a row of results/gpu.csv."""
    rate = facts["rates"][str(case.tokens)]
    measured: dict[str, str | int | float] = dict.fromkeys(MEASURED, "")
    if result["status"] == OK:
        limit = rate / result["flops_per_token"]
        measured |= {
            "tokens_per_second": round(result["tokens_per_second"], 1),
            "flops_per_token": round(result["flops_per_token"]),
            "limit_tokens_per_second": round(limit, 1),
            "share_of_limit": round(result["tokens_per_second"] / limit, 4),
            "seconds": json.dumps([round(item, 5) for item in result["seconds"]]),
            "losses": json.dumps([round(item, 5) for item in result["losses"]]),
        }
        measured |= {name: result[name] for name in (*MEMORY, "path") if name in result}
        if reference is not None and reference["status"] == OK:
            measured["loss_gap_to_philora"] = round(largest_gap(result["losses"], reference["losses"]), 5)
        for name in ("tokens", "labels", "settings", "versions"):
            measured[name] = json.dumps(result[name], sort_keys=True)
    return {
        **facts["stamp"],
        "device": facts["device"],
        "work": given.work.name,
        "contestant": case.contestant,
        "base": case.base,
        "row_tokens": case.tokens,
        "kept": case.kept,
        "lora_dropout": case.dropout,
        "cuda_graphs": case.graphs,
        "round": number,
        "status": result["status"],
        "warmup_steps": given.warmup,
        "timed_steps": given.steps,
        "matmul_flops_per_second": round(rate),
        **measured,
    }


MEMORY = ("max_memory_allocated", "max_memory_reserved", "planned_memory_allocated")
MEASURED = (
    "path",
    "tokens_per_second",
    "flops_per_token",
    "limit_tokens_per_second",
    "share_of_limit",
    *MEMORY,
    "seconds",
    "tokens",
    "labels",
    "losses",
    "settings",
    "versions",
    "loss_gap_to_philora",
)


def run_group(cases: list[Case], given: argparse.Namespace, deadline: float, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the results of the cases of a process."""
    why = missing(cases[0].contestant)
    left = deadline - time.monotonic()
    if why is None and left < given.least_seconds:
        why = SKIPPED
    if why is not None:
        return {item.name: {"status": why} for item in cases}
    settings = Settings(given.work, given.device, given.warmup, given.steps, left - given.least_seconds)
    task = json.dumps({"settings": asdict(settings), "cases": [asdict(item) for item in cases]})
    stem = folder / cases[0].name.replace("/", "-")
    done: dict[str, dict[str, Any]] = {}
    why = "the process ended before it"
    try:
        done = start([*COMMAND, "contestant", task], stem, environment_of(given), left)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:300]
        partial = stem.with_suffix(".json")
        if partial.exists():
            done = json.loads(partial.read_text(encoding="utf-8"))
    return {item.name: done.get(item.name, {"status": why}) for item in cases}


COMMAND = (sys.executable, "-m", "benchmarks.gpu", "--process")


def environment_of(given: argparse.Namespace) -> dict[str, str]:
    """Return the environment of a process: one GPU, since transformers' trainer would take all."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    return environment(given.threads) | {"CUDA_VISIBLE_DEVICES": visible.split(",")[0]}


def table_of(results: dict[Case, list[dict[str, Any]]], facts: dict[str, Any]) -> Table:
    """Print the table: medians over the rounds."""
    table = Table(box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    columns = ("allocated", "reserved", "planned")
    for column in ("tokens/s", "of limit", *(f"{item} GB" for item in columns), "loss", f"gap to {REFERENCE}"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, all_rounds in results.items():
        done = [item for item in all_rounds if item["status"] == OK]
        if not done:
            table.add_row(case.name, f"[red]{all_rounds[-1]['status'][:80]}[/]")
            continue
        last, speed = done[-1], median(item["tokens_per_second"] for item in done)
        theirs = [item for item in results.get(reference_of(case, REFERENCE), []) if item["status"] == OK]
        memory = [last.get(item) for item in MEMORY]
        table.add_row(
            case.name,
            f"{speed:,.0f}",
            f"{speed * last['flops_per_token'] / facts['rates'][str(case.tokens)]:.1%}",
            *("-" if item is None else f"{item / 1e9:.2f}" for item in memory),
            f"{last['losses'][0]:.3f} → {last['losses'][-1]:.3f}",
            f"{largest_gap(last['losses'], theirs[-1]['losses']):.4f}" if theirs else "-",
        )
    return table


def best_of(results: dict[Case, list[dict[str, Any]]], ours: bool, base: str) -> tuple[Case, float] | None:
    """The fastest case of philora, or of all others, over a base, and its tokens a second; None where none ran."""
    speeds = [
        (case, median(item["tokens_per_second"] for item in done))
        for case, rounds in results.items()
        if (case.contestant == "philora") == ours and case.base == base
        and (done := [item for item in rounds if item["status"] == OK])
    ]  # fmt: skip
    return max(speeds, key=lambda item: item[1], default=None)


def verdicts(results: dict[Case, list[dict[str, Any]]]) -> Iterator[str]:
    """philora's best case beside the best of all others, each at the packs and settings that suit it most."""
    for base in BASES:
        mine, theirs = best_of(results, True, base), best_of(results, False, "bf16" if base == "fp8" else base)
        if mine is not None and theirs is not None:
            yield (
                f"{base}: {mine[0].name} has {mine[1]:,.0f} tokens/s, {mine[1] / theirs[1]:.2f} times the best of the "
                f"others, {theirs[0].name} with {theirs[1]:,.0f}"
            )


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        default="*/keep,*/recompute",
        help="cases in this order, as patterns of CONTESTANT/BASE/TOKENS/keep|elementwise|recompute|host[+dropout]"
        "[+graphs]: philora/*/keep",
    )
    parser.add_argument("--long", action="store_true", help="also packs of 16384 tokens")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock counts")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu.csv", help="table that rows are added to")
    parser.add_argument("--work-dir", type=Path, default=default_root(), help="what the processes print")
    parser.add_argument("--no-write", action="store_true", help="leave the table as it is")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps: does it run?")
    given = parser.parse_args(line)
    given.only = given.only.split(",")
    given.work, given.tokens, given.least_seconds = MINI, (2048, 8192), 30.0
    given.tokens += (16384,) if given.long or any("/16384/" in pattern for pattern in given.only) else ()
    if given.quick:
        given.work, given.tokens, given.least_seconds = WORKS["quick"], (256, 512), 5.0
        given.warmup, given.steps, given.threads = 1, 2, 1
        given.no_write = given.no_write or given.results == RESULTS / "gpu.csv"
    if min(given.rounds, given.warmup, given.steps, given.threads) < 1:
        parser.error("rounds, warmup, steps and threads: expected at least 1")
    given.groups = list(groups(given.only, given.tokens))
    if not given.groups:
        known = [item.name for cases in groups(["*/keep"], given.tokens) for item in cases]
        parser.error(f"--only: {','.join(given.only)!r} - expected patterns of some of {', '.join(known)}")
    return given


def measure(given: argparse.Namespace, console: Console, folder: Path) -> int:
    """All rounds; rows are written as processes end."""
    deadline = time.monotonic() + 60 * given.minutes
    works = [asdict(replace(given.work, row_tokens=item)) for item in given.tokens]
    stamp = {"date": now(), "commit": commit(REPOSITORY)}
    results: dict[Case, list[dict[str, Any]]] = {}
    facts: dict[str, Any] = {}
    for number in range(1, given.rounds + 1):
        if number == 1 or deadline - time.monotonic() > 2 * given.least_seconds:
            task = json.dumps({"device": given.device, "works": works})
            try:
                facts = start([*COMMAND, "rates", task], folder / "rates", environment_of(given), 120) | {
                    "stamp": stamp
                }
            except RuntimeError as error:
                console.print(f"[red]{error}[/]", highlight=False)
                return 1
            described = ", ".join(f"{tokens}: {rate / 1e12:.1f}" for tokens, rate in facts["rates"].items())
            console.print(f"{facts['device']}: TFLOP/s of bf16 products at rows of {described}", highlight=False)
        # Every other round goes backwards, so that a device that warms up favours nobody.
        for cases in given.groups if number % 2 else reversed(given.groups):
            done = run_group(cases, given, deadline, folder)
            for case in cases:
                result = done[case.name]
                results.setdefault(case, []).append(result)
                if not given.no_write:
                    reference = results.get(reference_of(case, "philora"), [None])[-1]
                    append(given.results, row_of(case, number, result, facts, given, reference))
                said = f"{result['tokens_per_second']:,.0f} tokens/s" if result["status"] == OK else result["status"]
                said += f", {result['path']}" if result.get("path") else ""
                console.print(f"{case.name}: {said}", highlight=False, markup=False)
    console.print(table_of(results, facts))
    for item in verdicts(results):
        console.print(item, highlight=False, markup=False)
    faults = [f"{case.name}: {one['fault']}" for case, item in results.items() for one in item if one.get("fault")]
    for tokens in given.tokens:
        same = {case.name: [one for one in item if one["status"] == OK] for case, item in results.items()
                if case.tokens == tokens}  # fmt: skip
        faults += disagreements({name: Runs(item) for name, item in same.items()})
    for item in faults:
        console.print(item, style="red", highlight=False, markup=False)
    return 1 if faults else 0


def main() -> int:
    """Run the benchmark; 1 when there is no device, a fallback ran, or a contestant had other work than the rest."""
    given = arguments()
    console = Console(soft_wrap=True)
    console.width = max(console.width, 124)
    folder: Path = given.work_dir / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    return measure(given, console, folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        child(sys.argv[2:])
    else:
        try:
            sys.exit(main())
        except KeyboardInterrupt:
            sys.exit("stopped; rows of the processes that had ended are written")
