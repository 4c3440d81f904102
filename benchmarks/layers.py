"""Time a LoRA layer, forward and backward, beside its frozen base: philora, loralib and PEFT in one run.

`python -m benchmarks.layers [--rounds N] [--threads N] [--tokens N] [--device cpu|cuda] [--write]`

The work is bf16: y = layer(x), then the gradients of x, A and B from a given dy; the base is frozen. The yardstick is
`torch.nn.Linear` with a frozen weight and the gradient of x alone. In every round each contestant runs right beside a
run of the yardstick of its own, and its ratio is the median over the rounds of the two times' ratio: a machine that
slows down for a while slows both. All contestants hold the same weight, and A and B of the same values, and before
anything is timed their outputs and gradients of x are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import loralib
import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import philora
from benchmarks.machine import clock, describe, matmul_rate
from benchmarks.process import REPOSITORY
from benchmarks.results import RESULTS, append, commit, now
from philora import lora
from philora.adapters.fast_layers import FastLinear
from philora.adapters.peft_models import apply_slices
from philora.adapters.slices import Slice

PACKAGES = ("torch", "loralib", "peft", "transformers")
SLICES = 3
SCALING = 2
YARDSTICK = "nn.Linear, frozen"
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and its input."""

    tokens: int
    in_features: int
    out_features: int
    r: int


@dataclass(frozen=True)
class Values:
    """Hold the tensors of all contestants: the weight, and A and B of one update and of one for each slice."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    sliced_A: Tensor

    @classmethod
    def draw(cls, shape: Shape, device: str) -> Values:
        """Values from a fixed seed; the update is larger than the weight, so that `disagreement` sees its faults."""
        torch.manual_seed(0)

        def normal(rows: int, columns: int, deviation: float) -> Tensor:
            return torch.randn(rows, columns, device=device).mul_(deviation).to(DTYPE)

        return cls(
            normal(shape.out_features, shape.in_features, 0.02),
            normal(shape.r, shape.in_features, 0.1),
            normal(shape.out_features, shape.r, 0.1),
            normal(SLICES * shape.r, shape.in_features, 0.1),
        )


def yardstick(values: Values, dropout: float) -> nn.Module:
    """A linear layer whose weight is frozen."""
    layer = nn.Linear(*values.weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(values.weight, requires_grad=False)
    return layer


def of_loralib(library: object, merged: bool) -> Callable[[Values, float], nn.Module]:
    """loralib's layers, or philora's of the same names; A and B in bf16, as both make them from a bf16 layer."""

    def build(values: Values, dropout: float) -> nn.Module:
        rows, columns = values.weight.shape
        r = values.lora_B.shape[1]
        settings = {"r": r, "lora_alpha": SCALING * r, "lora_dropout": dropout, "bias": False, "dtype": DTYPE}
        if merged:
            layer = library.MergedLinear(columns, rows, enable_lora=[True] * SLICES, **settings)
        else:
            layer = library.Linear(columns, rows, **settings)
        layer.to(values.weight.device)
        lora_A = values.sliced_A if merged else values.lora_A
        layer.load_state_dict({"weight": values.weight, "lora_A": lora_A, "lora_B": values.lora_B})
        return layer

    return build


def of_peft(fast: bool, sliced: bool = False, float32: bool = True) -> Callable[[Values, float], nn.Module]:
    """PEFT's layer around a linear one, or philora's in its place; A and B in fp32, as PEFT makes them, or in bf16."""

    def build(values: Values, dropout: float) -> nn.Module:
        r = values.lora_B.shape[1]
        rank = SLICES * r if sliced else r
        config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, lora_dropout=dropout, target_modules=["proj"])
        base = nn.ModuleDict({"proj": yardstick(values, 0.0)})
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=float32)
        if fast:
            philora.optimize(model)
        rows = len(values.weight) // SLICES
        lora_B = values.lora_B
        if sliced:
            lora_B = torch.block_diag(*lora_B.split(rows))
            layout = [Slice(f"{i}", i * rows, (i + 1) * rows, i * r, (i + 1) * r) for i in range(SLICES)]
            apply_slices(model, {"proj": tuple(layout)})
        layer = model.base_model.model["proj"]
        assert isinstance(layer, FastLinear) is fast
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(values.sliced_A if sliced else values.lora_A)
            layer.lora_B["default"].weight.copy_(lora_B)
        return layer

    return build


@dataclass(frozen=True)
class Contestant:
    """A layer to be timed.

    Attributes:
        sliced: Whether it has an update for each slice of the output, or one.
    """

    title: str
    build: Callable[[Values, float], nn.Module]
    sliced: bool = False


CONTESTANTS = (
    Contestant("philora lora.Linear", of_loralib(lora, False)),
    Contestant("philora lora.MergedLinear", of_loralib(lora, True), True),
    Contestant("loralib Linear", of_loralib(loralib, False)),
    Contestant("loralib MergedLinear", of_loralib(loralib, True), True),
    Contestant("philora FastLinear", of_peft(True)),
    Contestant("philora FastLinear, slices", of_peft(True, sliced=True), True),
    Contestant("PEFT Linear", of_peft(False)),
    Contestant("PEFT Linear, A and B in bf16", of_peft(False, float32=False)),
)


class Run:
    """A layer with its input: each call is one forward and backward."""

    def __init__(self, layer: nn.Module, x: Tensor, dy: Tensor) -> None:
        layer.train()  # loralib's returns nothing
        self.layer, self.x, self.dy = layer, x.clone().requires_grad_(), dy

    def __call__(self) -> Tensor:
        """The output; the gradients are left at the tensors."""
        self.x.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None
        y: Tensor = self.layer(self.x)
        y.backward(self.dy)
        return y.detach()


def disagreement(run: Run, values: Values, sliced: bool) -> float:
    """Return how far output and gradient of x are from the merged weight's in fp32: norm over norm, the larger."""
    rows = len(values.weight) // SLICES
    parts = zip(values.lora_B.float().split(rows), values.sliced_A.float().chunk(SLICES), strict=True)
    delta = torch.cat([b @ a for b, a in parts]) if sliced else values.lora_B.float() @ values.lora_A.float()
    weight = values.weight.float() + SCALING * delta
    y = run()
    want = {"y": run.x.detach().float() @ weight.t(), "x": run.dy.float() @ weight}
    got = {"y": y.float(), "x": run.x.grad.float()}
    return max(float((got[name] - want[name]).norm() / want[name].norm()) for name in want)


@dataclass
class Times:
    """Milliseconds of a contestant in each round, and its ratios to the yardstick that ran beside it."""

    contestant: str
    dropout: float
    milliseconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    @staticmethod
    def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile."""
        if len(numbers) < 2:
            return (numbers[0],) * 3
        low, _, high = quantiles(numbers, n=4, method="inclusive")
        return low, median(numbers), high


def measure(given: argparse.Namespace, shape: Shape, console: Console) -> list[Times]:
    """All rounds.

    Raises:
        RuntimeError: A contestant computes something else than the others.
    """
    values = Values.draw(shape, given.device)
    x = torch.randn(shape.tokens, shape.in_features, device=given.device).to(DTYPE)
    dy = torch.randn(shape.tokens, shape.out_features, device=given.device).to(DTYPE)
    few = min(shape.tokens, 64)
    # Of the norm: bf16 rounds each number by up to 2^-9 of it.
    for item in CONTESTANTS:
        gap = disagreement(Run(item.build(values, 0.0), x[:few], dy[:few]), values, item.sliced)
        if gap > 2**-8:
            raise RuntimeError(f"{item.title}: gap={gap:.1e} - expected at most {2**-8:.1e} from the merged weight.")

    runs = [(Times(YARDSTICK, 0.0), Run(yardstick(values, 0.0), x, dy))]
    for dropout in (0.0, 0.05):
        runs += [(Times(item.title, dropout), Run(item.build(values, dropout), x, dy)) for item in CONTESTANTS]
    base, timed = runs[0][1], clock(given.device)
    for _, run in runs:
        for _ in range(given.warmup):
            run()
    for number in range(given.rounds):
        # Every other round goes backwards, and so does the order within a pair.
        for times, run in runs if number % 2 else reversed(runs):
            if number % 2:
                frozen, own = timed(base), timed(run)
            else:
                own, frozen = timed(run), timed(base)
            times.milliseconds.append(own)
            times.ratios.append(own / frozen)
        console.print(f"round {number + 1} of {given.rounds}", highlight=False)
    return [times for times, _ in runs]


def row_of(times: Times, shape: Shape, given: argparse.Namespace, rate: float) -> dict[str, str | int | float]:
    """Return a row of results/layers.csv."""
    low, middle, high = times.quartiles(times.milliseconds)
    ratio_low, ratio, ratio_high = times.quartiles(times.ratios)
    facts = describe(given.device, PACKAGES)
    versions = {name: facts.pop(name) for name in ("python", *PACKAGES)}
    return {
        "commit": commit(REPOSITORY),
        "date": now(),
        "machine": json.dumps(facts),
        "versions": json.dumps(versions),
        "device": given.device,
        "threads": torch.get_num_threads(),
        "tokens": shape.tokens,
        "in": shape.in_features,
        "out": shape.out_features,
        "r": shape.r,
        "dtype": str(DTYPE).removeprefix("torch."),
        "contestant": times.contestant,
        "dropout": times.dropout,
        "median_ms": round(middle, 3),
        "p25": round(low, 3),
        "p75": round(high, 3),
        "ratio": round(ratio, 4),
        "ratio_p25": round(ratio_low, 4),
        "ratio_p75": round(ratio_high, 4),
        "rounds": given.rounds,
        "matmul_gflops": round(rate, 1),
    }


def table_of(rows: Sequence[dict[str, str | int | float]]) -> Table:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    for column in ("contestant", "dropout", "ms", "quartiles", "ratio", "quartiles"):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["contestant"]),
            f"{row['dropout']:g}",
            f"{row['median_ms']:.1f}",
            f"{row['p25']:.1f}..{row['p75']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['ratio_p25']:.3f}..{row['ratio_p75']:.3f}",
        )
    return table


def arguments(line: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="calls of each contestant before the clock counts")
    parser.add_argument("--threads", type=int, default=2, help="on the CPU")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--in-features", type=int, default=3072)
    parser.add_argument("--out-features", type=int, default=9216, help=f"a multiple of {SLICES}")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--write", action="store_true", help="add the rows to results/layers.csv")
    given = parser.parse_args(line)
    for name in ("rounds", "warmup", "threads", "tokens", "in_features", "out_features", "rank"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(given, name)} - expected at least 1")
    if given.out_features % SLICES:
        parser.error(f"--out-features: {given.out_features} - expected a multiple of {SLICES}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' - expected a device that torch finds")
    return given


def main() -> int:
    """Run the benchmark."""
    given = arguments()
    torch.set_num_threads(given.threads)
    console = Console(width=max(Console().width, 100))  # the table's width, also where the output is no terminal
    shape = Shape(given.tokens, given.in_features, given.out_features, given.rank)
    sizes = (DTYPE, shape.tokens, shape.in_features, shape.out_features, given.device)
    before = matmul_rate(*sizes)
    results = measure(given, shape, console)
    rates = before, matmul_rate(*sizes)
    rows = [row_of(times, shape, given, median(rates)) for times in results]
    console.print(table_of(rows))
    console.print(
        f"{shape.tokens} tokens, {shape.in_features} to {shape.out_features}, r {shape.r}, bf16, forward and backward; "
        f"{torch.get_num_threads()} threads; products at {rates[0]:,.0f} GFLOP/s before and {rates[1]:,.0f} after",
        highlight=False,
        soft_wrap=True,
    )
    if given.write:
        for row in rows:
            append(RESULTS / "layers.csv", row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
