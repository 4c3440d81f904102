"""Measure the effect of base products in fp8 on the result of a training, emulated by PyTorch's casts on a CPU.

    python -m benchmarks.fp8 [--tasks NAME ...] [--only NAME ...] [--seeds 1 2 3]
    python -m benchmarks.fp8 --table            # the rows as docs/performance.md shows them

The bundled model and the tasks of `benchmarks.rates`, with the default settings. In training, the frozen weights'
products take operands that are rounded as a GPU would round them, one scale a row; sums are fp32. Adapters, norms,
attention and head stay in bf16, and so does all of the evaluation: the adapter is scored on the base that it will be
used with. What is in results/fp8.csv already is not run again. The rows hold scores, not times.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line sets it

import torch
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor

from benchmarks import rates
from benchmarks.results import RESULTS, append
from philora.adapters import fast_layers as adapters
from philora.decoder_stack.products import Fp8Product, PlainProduct, scaled_product
from philora.decoder_stack.rows import Rows

TABLE = RESULTS / "fp8.csv"
FORMATS = {
    "bf16": (None, None),
    "fp8, backward in e4m3": ("e4m3", "e4m3"),
    "fp8, backward in e5m2": ("e4m3", "e5m2"),
    "fp8, backward in bf16": ("e4m3", "weight"),
}
"""Of each variant the format of the forward product's operands, and of the gradient in the backward product."""


class _GradientInE5m2(Fp8Product):
    """As `Fp8Product`, the gradient in e5m2, which has more range and 2 bits of mantissa; the weight in e4m3."""

    def backward(self, dy: Rows) -> Tensor:
        """As `Product.backward`."""
        assert self._backward is not None
        wide = dy.values.float()
        scales = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e5m2).max
        return scaled_product((wide / scales).to(torch.float8_e5m2), scales, *self._backward, dy.values.dtype)


class _Product(torch.autograd.Function):
    """The product of a frozen weight in one of the forms of `decoder_stack.products`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Any) -> Tensor:
        ctx.product = product
        return product.forward(Rows(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.product.backward(Rows(grads[0].contiguous())), None


def _layer_class(forward: str | None, backward: str | None) -> type[adapters.FastLinear]:
    class Emulated(adapters.FastLinear):
        """A LoRA layer whose base's product is computed in a chosen format while it trains."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not (self.training and torch.is_grad_enabled()):
                return super().forward(x, *args, **kwargs)
            weight = self.base_layer.weight.detach()
            if "_emulated" not in self.__dict__:
                kinds = {
                    (None, None): lambda: PlainProduct(weight),
                    ("e4m3", "e4m3"): lambda: Fp8Product(weight),
                    ("e4m3", "e5m2"): lambda: _GradientInE5m2(weight),
                    ("e4m3", "weight"): lambda: Fp8Product(weight, backward="weight"),
                }
                self.__dict__["_emulated"] = kinds[forward, backward]()
            flat = x.reshape(-1, x.shape[-1])
            y = _Product.apply(flat, self.__dict__["_emulated"])
            down = self.lora_dropout["default"](flat) @ self.lora_A["default"].weight.to(x.dtype).t()
            up = self.scaling["default"] * self.lora_B["default"].weight
            return (y + down @ up.to(x.dtype).t()).view(*x.shape[:-1], -1)

    return Emulated


@contextmanager
def emulated(name: str) -> Iterator[None]:
    """Make new LoRA layers in the block compute their base's products in the formats of a variant."""
    before = adapters.FAST[PeftLinear]
    adapters.FAST[PeftLinear] = _layer_class(*FORMATS[name])
    try:
        yield
    finally:
        adapters.FAST[PeftLinear] = before


def measured() -> list[dict[str, str]]:
    """Return the rows that there are."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def table() -> str:
    """Return the rows in Markdown: the mean loss of the seeds, and their exact matches beside each other."""
    lines = ["| task | base products in training | held-out loss | exact match |", "| --- | --- | --- | --- |"]
    rows = measured()
    for task in rates.TASKS:
        for name in FORMATS:
            same = [row for row in rows if (row["task"], row["what"]) == (task, name)]
            if not same:
                continue
            same.sort(key=lambda row: int(row["seed"]))
            losses = [float(row["eval_loss"]) for row in same]
            spread = f"{mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
            matches = ", ".join(f"{100 * float(row['exact_match']):.0f}%" for row in same)
            lines.append(f"| {task} | {name} | {spread} | {matches} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores of small tasks trained with base products in fp8.")
    parser.add_argument("--tasks", nargs="*", choices=list(rates.TASKS), default=list(rates.TASKS))
    parser.add_argument("--only", nargs="*", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--table", action="store_true", help="print the rows and train nothing")
    given = parser.parse_args()
    if given.table:
        print(table(), end="")
        return
    for task in given.tasks:
        for seed in given.seeds:
            for name in given.only:
                if (task, str(seed), name) in {(row["task"], row["seed"], row["what"]) for row in measured()}:
                    continue
                with emulated(name):
                    row = rates.run(task, "nano", "auto", seed) | {"what": name}
                append(TABLE, row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
