"""Record how philora's decoder layers were computed in a training, so that no fallback is silent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Taken:
    """Hold what computed the decoder layers.

    Attributes:
        choices: Forward passes by path and reasons, as `decoder_stack.choice.Choice`.
        scalings: Scalings of base products in fp8 that the stack took; None: no fp8.
        replayed: Passes by a CUDA graph.
        eager: Passes of the stack that a graph was asked for and that went without one.
    """

    choices: Counter[Any] = field(default_factory=Counter)
    scalings: set[str | None] = field(default_factory=set)
    replayed: int = 0
    eager: int = 0

    def __str__(self) -> str:
        said = []
        for choice, passes in self.choices.most_common():
            text = choice.path if choice.path == "stack" else str(choice)
            said.append(text if len(self.choices) == 1 else f"{text} in {passes} passes")
        if self.scalings - {None}:
            said.append("fp8 by " + "/".join(sorted(item for item in self.scalings if item is not None)))
        if self.replayed:
            said.append(f"a CUDA graph in {self.replayed} of {self.replayed + self.eager} passes")
        return ", ".join(said) or "modules (the stack was never asked)"

    @property
    def by_stack(self) -> bool:
        """Return whether the stack computed every pass."""
        return bool(self.choices) and all(choice.path == "stack" for choice in self.choices)

    def fault(self, fp8: bool = False, graphs: bool = False) -> str | None:
        """Say that something else ran than what was asked for, or return None.

        Args:
            fp8: Whether base products were to be in fp8.
            graphs: Whether most passes were to be replayed.
        """
        if not self.by_stack:
            return f"the decoder stack did not run: {self}"
        if fp8 and self.scalings - {None} == set():
            return f"no product was in fp8: {self}"
        if graphs and self.replayed <= self.eager:
            return f"a CUDA graph ran in {self.replayed} of {self.replayed + self.eager} passes"
        return None


@contextmanager
def watched() -> Iterator[Taken]:
    """Record what computes the decoder layers within the block. Nothing is read from the device."""
    from philora.decoder_stack import graphs, model

    taken = Taken()
    choose, stack_of, call = model.choose, model.stack_of, graphs.GraphRunner.__call__

    def choose_and_note(*given: Any) -> Any:
        found = choose(*given)
        taken.choices[found] += 1
        return found

    def stack_and_note(*given: Any) -> Any:
        found = stack_of(*given)
        taken.scalings.add(found.fp8)
        return found

    def call_and_note(*given: Any) -> Any:
        found = call(*given)
        if found is None:
            taken.eager += 1
        else:
            taken.replayed += 1
        return found

    model.choose, model.stack_of = choose_and_note, stack_and_note
    graphs.GraphRunner.__call__ = call_and_note  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        model.choose, model.stack_of = choose, stack_of
        graphs.GraphRunner.__call__ = call  # type: ignore[method-assign]
