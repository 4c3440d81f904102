"""What the benchmarks on a card note of the way that philora's decoder layers went."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.paths import Taken, watched
from philora.decoder_stack import model as stacked
from philora.decoder_stack.choice import Choice
from philora.decoder_stack.graphs import GraphRunner
from tests.stacked import by_stack, inputs, make, positions

STACK = Choice("stack", ("a GPU",))
MODULES = Choice("modules", ("the card disagrees",))


@pytest.fixture(autouse=True)
def _everything_that_is_there(monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "all")


def test_the_stack_is_noted():
    with watched() as taken:
        by_stack(make())
    assert str(taken) == "stack"
    assert taken.fault() is None
    assert taken.fault(fp8=True) == "no product was in fp8: stack"
    assert taken.fault(graphs=True) == "a CUDA graph ran in 0 of 0 passes"


def test_products_in_fp8_are_noted():
    with watched() as taken:
        by_stack(make().to(torch.bfloat16), dtype=torch.bfloat16, fp8=True)
    assert str(taken) == "stack, fp8 by rows"
    assert taken.fault(fp8=True) is None


@pytest.mark.slow
def test_a_graph_is_noted(monkeypatch):
    from philora.decoder_stack import graphs

    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    monkeypatch.setattr(graphs, "against", lambda facts: [])
    with watched() as taken:
        by_stack(make())
    assert str(taken) == "stack, a CUDA graph in 1 of 1 passes"
    assert taken.fault(graphs=True) is None


def test_a_fallback_is_a_fault(monkeypatch):
    """What the comparison with plain PEFT finds on a card, and a batch that the stack does not cover."""
    own = stacked.choose
    monkeypatch.setattr(stacked, "choose", lambda *given: MODULES)
    with watched() as taken:
        by_stack(make())
    assert taken.fault() == "the decoder stack did not run: modules (the card disagrees)"
    monkeypatch.setattr(stacked, "choose", own)
    with watched() as taken:
        made = make()
        by_stack(made)
        x, _ = inputs(made)
        made.get_base_model().model(inputs_embeds=x, position_ids=positions(), output_hidden_states=True)
    assert "stack in 1 passes, modules (" in taken.fault()


def test_nothing_was_asked_for_is_a_fault(monkeypatch):
    monkeypatch.delenv("PHILORA_STACK")
    with watched() as taken:
        pass
    assert taken.fault() == "the decoder stack did not run: modules (the stack was never asked)"


def test_everything_is_put_back_after_an_error():
    before = stacked.choose, stacked.stack_of, GraphRunner.__call__
    with pytest.raises(ValueError, match="stop"), watched():
        raise ValueError("stop")
    assert (stacked.choose, stacked.stack_of, GraphRunner.__call__) == before


def test_passes_are_counted():
    taken = Taken()
    taken.choices.update({STACK: 3, MODULES: 1})
    taken.replayed, taken.eager = 1, 2
    assert str(taken) == ("stack in 3 passes, modules (the card disagrees) in 1 passes, a CUDA graph in 1 of 3 passes")
