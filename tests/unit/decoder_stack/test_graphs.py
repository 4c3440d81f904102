"""The decoder stack by graphs against the stack without; on a CPU a graph is its own passes, over the same buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from philora import optimize
from philora.decoder_stack import graphs
from philora.decoder_stack import model as stacked
from philora.decoder_stack.graphs import GraphFacts, GraphRunner, Size, against, size_for
from philora.decoder_stack.model import configure
from philora.kernels import graphs as cuda_graphs
from tests.conftest import make_phi3
from tests.stacked import DEVICE, inputs, largest_difference, make, positions
from tests.tolerances import GRADIENTS_FP32

SEED = 5
FIRST, SECOND, MANY = (2, 1), (1, 1), (1, 1, 1, 1)


@pytest.fixture(autouse=True)
def _small_graphs(monkeypatch):
    """Graphs on this device, of few tokens: each of them is a program of the interpreter."""
    monkeypatch.setenv("PHILORA_STACK", "all")
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    monkeypatch.setattr(graphs, "EVEN_TOKENS", 4)
    monkeypatch.setattr(graphs, "LAYOUTS", ((3, 2), (3, 4)))
    stacked._runners.clear()
    monkeypatch.setattr(graphs, "against", lambda facts: [])
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: cuda_graphs.repeat)


@pytest.fixture
def replays(monkeypatch):
    """The sizes of the graphs that ran."""
    seen: list[Size] = []
    own = graphs.StackGraph.forward
    monkeypatch.setattr(graphs.StackGraph, "forward", lambda self, each: (seen.append(self.size), own(self, each))[1])
    return seen


def run(
    model: Any, batches: Sequence[Sequence[int]], recomputation: str = "none", dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Outputs, and the gradients that the batches have added up to."""
    optimize(model, recomputation="elementwise" if recomputation == "elementwise" else "none")
    decoder = model.get_base_model().model
    for layer in decoder.layers:
        layer.gradient_checkpointing = recomputation == "full"
    configure(model, seed=SEED, counter=0)
    stacked._counters.clear()
    found = {}
    for index, lengths in enumerate(batches):
        x, grad = inputs(model, lengths, dtype)
        leaf = x.requires_grad_()
        output = decoder(inputs_embeds=leaf, position_ids=positions(lengths), use_cache=False)[0]
        output.backward(grad * (index + 1))
        found |= {f"output {index}": output.detach(), f"input {index}": leaf.grad}
    for name, each in model.named_parameters():
        if each.grad is not None:
            found[name], each.grad = each.grad, None
    return found


def plainly(model: Any, batches: Sequence[Sequence[int]], monkeypatch: Any, **settings: Any) -> dict[str, Tensor]:
    with monkeypatch.context() as patch:
        patch.setenv("PHILORA_GRAPHS", "0")
        return run(model, batches, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recomputation", ["none", *(pytest.param(each, marks=pytest.mark.slow) for each in ("elementwise", "full"))]
)
def test_two_micro_batches_add_up_as_without_a_graph(replays, monkeypatch, recomputation):
    made = make(layers=2 if recomputation == "none" else 1, dropout=0.25)
    expected = plainly(made, [FIRST, SECOND], monkeypatch, recomputation=recomputation)
    assert not replays
    found = run(made, [FIRST, SECOND], recomputation=recomputation)
    assert replays == [Size(4, 3, 2)] * 2
    assert largest_difference(found, expected) < GRADIENTS_FP32
    assert stacked.dropout_state(made) == {"seed": SEED, "counter": 2}


def _aliased(tensors: Any) -> list[Tensor | None]:
    """As PyTorch's `make_graphed_callables` hands gradients out."""
    return [None if each is None else each.detach() for each in tensors]


def test_gradients_that_are_the_graphs_own_memory_show(monkeypatch):
    made = make()
    expected = plainly(made, [FIRST, SECOND], monkeypatch)
    monkeypatch.setattr(graphs, "own_copies", _aliased)
    assert largest_difference(run(made, [FIRST, SECOND]), expected) > 0.1


def _one_document(self: Any, given: Any) -> None:
    self._bounds[1] = self._bounds[2]  # two documents as one


def _same_counter(self: Any, given: Any) -> None:
    if given.counter is not None:
        self._counter.fill_(SEED)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [_one_document, _same_counter])
def test_the_comparison_notices_what_a_graph_is_given_wrongly(monkeypatch, plant):
    made = make(dropout=0.25)
    expected = plainly(made, [FIRST, FIRST], monkeypatch)
    load = graphs.StackGraph._load
    monkeypatch.setattr(graphs.StackGraph, "_load", lambda self, given: (load(self, given), plant(self, given))[0])
    assert largest_difference(run(made, [FIRST, FIRST]), expected) > 100 * GRADIENTS_FP32


@pytest.mark.slow
def test_a_row_that_fits_no_size_runs_without_one_and_the_next_by_its_graph(replays, monkeypatch, caplog):
    made = make()
    batches = [MANY, FIRST, MANY, (4,)]
    expected = plainly(made, batches, monkeypatch)
    assert largest_difference(run(made, batches), expected) < GRADIENTS_FP32
    assert replays == [Size(4, 3, 2), Size(4, 3, 4)]
    notice = "decoder layers run without a CUDA graph: 4 tokens in 4 documents of up to 1 fit none of its sizes"
    assert caplog.text.count("without a CUDA graph") == caplog.text.count(notice) == 1


def test_a_pass_that_waits_for_backward_keeps_its_graph(replays):
    """Two forward passes and then their backward passes, as a loss of two batches has them."""
    made = make()
    optimize(made)
    decoder = made.get_base_model().model
    given = {each: inputs(made, each) for each in (FIRST, SECOND)}

    def output(lengths: Sequence[int]) -> Tensor:
        found: Tensor = decoder(inputs_embeds=given[lengths][0], position_ids=positions(lengths), use_cache=False)[0]
        return found

    one, two = output(FIRST), output(SECOND)
    assert len(replays) == 1
    (one * given[FIRST][1]).sum().backward(retain_graph=True)
    (two * given[SECOND][1]).sum().backward()
    found = {name: each.grad.clone() for name, each in made.named_parameters() if each.grad is not None}
    made.zero_grad()
    for lengths in (FIRST, SECOND):
        (output(lengths) * given[lengths][1]).sum().backward()
    assert len(replays) == 3
    expected = {name: each.grad for name, each in made.named_parameters() if each.grad is not None}
    assert largest_difference(found, expected) < GRADIENTS_FP32
    with pytest.raises(RuntimeError, match="one backward pass for each forward pass"):
        one.sum().backward()


def test_a_pass_whose_output_is_let_go_does_not_keep_its_graph(replays):
    made = make()
    optimize(made)
    decoder = made.get_base_model().model
    for _ in range(3):
        decoder(inputs_embeds=inputs(made, FIRST)[0], position_ids=positions(FIRST), use_cache=False)
    assert len(replays) == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Offset increment"),
        OutOfResources(300000, 232448, "shared memory"),
    ],
)
def test_a_recording_that_fails_is_told_once_and_leaves_everything(replays, monkeypatch, caplog, error):
    def fails(work: Any, device: Any, pool: Any) -> Any:
        torch.rand(3)
        raise error

    made = make()
    expected = plainly(made, [FIRST, SECOND], monkeypatch)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: fails)
    state = torch.get_rng_state()
    assert largest_difference(run(made, [FIRST, SECOND]), expected) < GRADIENTS_FP32
    assert torch.equal(torch.get_rng_state(), state)
    assert not replays
    assert caplog.text.count("without a CUDA graph") == 1
    assert f"{type(error).__name__}: {error}" in caplog.text


def test_no_memory_for_a_graphs_own_buffers_is_told_and_the_step_goes_without(replays, monkeypatch, caplog):
    made = make()
    expected = plainly(made, [FIRST, SECOND], monkeypatch)

    def fails(self: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(graphs.StackGraph, "_load", fails)
    assert largest_difference(run(made, [FIRST, SECOND]), expected) < GRADIENTS_FP32
    assert caplog.text.count("without a CUDA graph: CUDA out of memory") == 1


def test_a_graph_that_computes_something_else_is_told_and_left(replays, monkeypatch, caplog):
    def wrong(work: Any, device: Any, pool: Any) -> Any:
        made = cuda_graphs.repeat(work, device, pool)
        return made._replace(replay=lambda: (made.replay(), made.results[0].mul_(1.01)))

    made = make()
    expected = plainly(made, [FIRST], monkeypatch)
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: wrong)
    assert largest_difference(run(made, [FIRST]), expected) < GRADIENTS_FP32
    assert not replays
    assert "its results differ by 0.01 from those without one" in caplog.text


@pytest.mark.slow
def test_another_adapter_and_other_memory_get_graphs_of_their_own(replays, monkeypatch):
    from peft import LoraConfig

    made = make()
    made.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    run(made, [FIRST])
    (first,) = [each.made for each in stacked._runners.values()]
    assert len(first) == 1
    made.set_adapter("other")
    expected = plainly(made, [FIRST], monkeypatch)
    assert largest_difference(run(made, [FIRST]), expected) < GRADIENTS_FP32
    for each in made.parameters():
        each.data = each.data.clone() if each.requires_grad else each.data
        each.data.mul_(1.5 if each.requires_grad else 1.0)
    expected = plainly(made, [FIRST], monkeypatch)
    assert largest_difference(run(made, [FIRST]), expected) < GRADIENTS_FP32
    assert len(replays) == 3
    made.base_model.set_adapter(["default", "other"])
    run(made, [FIRST])
    assert not any(True for _ in stacked._runners.values()), "two adapters at once: the modules, and no graphs"
    assert len(replays) == 3


def test_the_size_of_a_graph(monkeypatch):
    monkeypatch.undo()
    few, many = Size(2048, 24, 1024), Size(2048, 64, 2048)
    assert size_for(Size(2048, 24, 1024), []) == few
    assert size_for(Size(2048, 25, 300), []) == many
    assert size_for(Size(2048, 3, 1025), []) == many
    assert size_for(Size(2048, 65, 40), []) is None
    assert size_for(Size(2000, 24, 300), []) == many, "what fills a row up is a document too"
    assert size_for(Size(2000, 23, 300), []) == few
    assert size_for(Size(300, 2, 200), []) == Size(512, 24, 512)
    three = [few, many, Size(1024, 24, 1024)]
    assert size_for(Size(1800, 20, 300), three) == few, "there are enough: the smallest that holds it"
    assert size_for(Size(600, 5, 300), three) is None, "it would be computed twice over"
    assert size_for(Size(1025, 5, 300), three[:2]) == Size(1280, 24, 1024)


def test_which_trainings_take_graphs(monkeypatch):
    monkeypatch.undo()
    assert against(GraphFacts()) == []
    assert against(GraphFacts(switch="")) == ["no GPU has run this yet, PHILORA_GRAPHS=all takes it"]
    cases = {"kind": "cpu", "base": "int8", "dtype": "float32", "keep": "host", "devices": 2, "autocast": True}
    for name, value in cases.items():
        assert len(against(replace(GraphFacts(), **{name: value}))) == 1
    assert all(not against(GraphFacts(base=each)) for each in graphs.LARGEST_TOKENS)


def test_long_rows_run_without_a_graph_and_without_a_notice(replays, monkeypatch, caplog):
    monkeypatch.setattr(graphs, "LARGEST_TOKENS", {"plain": 2})
    run(make(), [FIRST])
    assert not replays
    assert "graph" not in caplog.text


def test_graphs_are_off_by_default(replays, monkeypatch):
    monkeypatch.delenv("PHILORA_GRAPHS")
    run(make(), [FIRST])
    assert not replays
    assert not any(isinstance(each, GraphRunner) for each in stacked._runners.values())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU")
@pytest.mark.parametrize("recomputation", ["none", "elementwise", "full"])
def test_on_a_gpu_micro_batches_by_cuda_graphs_add_up(replays, monkeypatch, recomputation):
    """In bf16, over rows of a real length; what a replay does not do would leave the values of the one before."""
    monkeypatch.undo()
    monkeypatch.setenv("PHILORA_STACK", "all")
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    own, ran = graphs.StackGraph.forward, []
    monkeypatch.setattr(graphs.StackGraph, "forward", lambda self, each: (ran.append(self.size), own(self, each))[1])
    made = make(base=make_phi3(hidden_size=64, intermediate_size=128).bfloat16(), dropout=0.1)
    batches = [(200, 40, 10), (30, 30, 120, 5), (250,), (60,) * 4]
    settings = {"recomputation": recomputation, "dtype": torch.bfloat16}
    expected = plainly(made, batches, monkeypatch, **settings)
    assert largest_difference(run(made, batches, **settings), expected) < 5e-2
    assert len(ran) == len(batches)
    assert set(ran) == {Size(256, 24, 256)}
