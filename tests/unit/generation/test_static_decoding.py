"""The step with a static cache against transformers' own generate; on a CPU it is repeated in place of a CUDA graph."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from philora.adapters.fast_layers import optimize
from philora.decoder_stack.choice import DeviceFacts
from philora.generation import conversation, decoding, static_decoding
from philora.generation.batches import GenerationSettings, generate
from philora.generation.conversation import AdapterPool
from philora.generation.static_decoding import (
    GraphFacts,
    StaticDecoder,
    TritonRows,
    against,
    answers_on,
    cache_tokens,
    filled_up,
)
from philora.kernels import graphs
from philora.training.readiness import Hardware
from tests.conftest import make_phi3
from tests.tolerances import LOGITS_BF16

NEW = 20
PROMPTS = [[5, 9, 14], [40, 3, 7, 22, 61, 30, 11, 8], [12], [33, 34, 35, 36, 37]]
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.2],
    "long_factor": [4.0, 9.0], "original_max_position_embeddings": 64,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
FAMILIES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "window": {"sliding_window": 6},
    "partial": {"rope_parameters": PARTIAL, "num_key_value_heads": 1},
    "tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "longrope short": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "longrope long": {
        "rope_parameters": LONGROPE | {"original_max_position_embeddings": 2}, "original_max_position_embeddings": 2,
    },
}  # fmt: skip


class Tokens:
    """What `generate` wants of a tokenizer, with prompts that are ids already."""

    pad_token_id, eos_token_id, unk_token_id = 0, 2, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture
def static(monkeypatch):
    """Answers by the static step on a CPU; the decoders that were made, and their rows at first."""
    made: list[tuple[StaticDecoder, int]] = []
    own = StaticDecoder.__init__

    def noted(self: StaticDecoder, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        made.append((self, self.rows))

    static_decoding._warn_once.cache_clear()
    monkeypatch.setattr(StaticDecoder, "__init__", noted)
    monkeypatch.setattr(static_decoding, "against", lambda facts: [])
    return made


@pytest.fixture(autouse=True)
def _prompts_are_ids(monkeypatch):
    from philora.generation import batches as generation

    monkeypatch.setattr(generation, "prompt_tokens", lambda tokenizer, prompts, **_: [list(each) for each in prompts])
    monkeypatch.setattr(generation, "stop_token_ids", lambda model, tokenizer: [2, 50])


def answers(model: Any, prompts: Any = PROMPTS, **settings: Any) -> list[str]:
    chosen = GenerationSettings(**({"max_new_tokens": NEW} | settings))
    return [each.text for each in generate(model, Tokens(), prompts, chosen)]


def by_transformers(model: Any, prompts: Any = PROMPTS) -> list[str]:
    """Greedy, one prompt at a time, without a cache."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, use_cache=False,
            eos_token_id=[2, 50], pad_token_id=0,
        )  # fmt: skip
        answer = output[0, len(prompt) :].tolist()
        found.append(" ".join(map(str, answer[:-1] if answer[-1] in (2, 50) else answer)))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_static_step_answers_as_transformers(static, family):
    model = make_phi3(**FAMILIES[family])
    expected = by_transformers(model)
    for batch_size in (1, 3, 16):
        assert answers(model, batch_size=batch_size) == expected
    assert len(set(expected)) == len(PROMPTS)
    assert any(len(each.split()) < NEW for each in expected) or family != "grouped", "some end by a stop token"
    assert [rows for _, rows in static] == [1, 8, 8]
    assert all(each._recorded is not None for each, _ in static)


def test_adapters_answer_as_themselves_and_as_the_base(static):
    lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
    model = optimize(get_peft_model(make_phi3(), lora)).eval()
    with_adapter = by_transformers(model)
    assert answers(model) == with_adapter
    with model.disable_adapter():
        assert answers(model) == by_transformers(model) != with_adapter
    assert len(static) == 2


def test_the_kernels_of_the_stack_compute_the_same_step(static, monkeypatch):
    pytest.importorskip("triton")
    model = make_phi3(rope_parameters=PARTIAL)
    expected = by_transformers(model, PROMPTS[:1])
    own = StaticDecoder.__init__
    monkeypatch.setattr(StaticDecoder, "__init__", lambda self, *a, **k: own(self, *a, **k, work=TritonRows()))
    assert answers(model, PROMPTS[:1]) == expected
    assert static[0][0]._recorded is not None


class Tape(TorchDispatchMode):
    """Records the operations of PyTorch with their tensors, as a CUDA graph records kernels with their addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
            raise RuntimeError("a number is read from the device")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self) -> None:
        for func, args, kwargs, old in self.calls:
            for mine, new in zip(tree_leaves(old), tree_leaves(func(*args, **kwargs)), strict=True):
                if mine.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    mine.copy_(new)


def taped(work: Any, device: Any, pool: Any = None) -> graphs.Recorded:
    """Stand for `graphs.record`: what the function decides in Python is decided once."""
    with Tape() as tape:
        results = work()
    return graphs.Recorded(tape.replay, results)


@pytest.mark.parametrize("family", ["window", "partial", "longrope long"])
def test_nothing_of_a_step_is_decided_outside_the_device(static, monkeypatch, family):
    monkeypatch.setenv("PHILORA_NATIVE", "0")  # compiled functions are no operations of PyTorch
    monkeypatch.setattr(graphs, "capture_for", lambda device: taped)
    lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
    model = optimize(get_peft_model(make_phi3(**FAMILIES[family]), lora)).eval()
    assert answers(model, batch_size=3) == by_transformers(model)
    assert all(each._recorded is not None for each, _ in static)


def test_a_position_that_is_decided_once_shows(static, monkeypatch, caplog):
    """The tape's own control: with the position as a number it repeats the first step, and reading one is refused."""
    monkeypatch.setenv("PHILORA_NATIVE", "0")
    monkeypatch.setattr(graphs, "capture_for", lambda device: taped)
    model = make_phi3()
    expected = answers(model)
    compute = StaticDecoder.compute
    fixed: list[Any] = []

    def planted(self: Any, tokens: Any, at: Any, width: int, work: Any) -> Any:
        fixed.append(at.clone())  # before the tape; what it records is a constant
        return compute(self, tokens, fixed[0] if work is self._work else at, width, work)

    monkeypatch.setattr(StaticDecoder, "compute", planted)
    assert answers(model, PROMPTS[:1]) != expected[:1]
    monkeypatch.setattr(
        StaticDecoder, "compute", lambda self, tokens, at, *rest: compute(self, tokens, at + at[0].item() * 0, *rest)
    )
    assert answers(model) == expected
    assert "a number is read from the device" in caplog.text


def _position(decoder):
    compute = decoder.compute
    return lambda tokens, at, width, work: compute(tokens, at + (work is decoder._work), width, work)


def _rotation(decoder):
    own = decoder._work.rotate
    decoder._work.rotate = lambda states, cos, sin, heads: own(states, cos, -sin, heads)
    return decoder.compute


@pytest.mark.parametrize("plant", [_position, _rotation])
def test_a_wrong_graph_is_noticed_and_left(static, monkeypatch, caplog, plant):
    """What a recording gets wrong shows in the comparison after it; without the comparison, in the answers."""
    model = make_phi3()
    expected = answers(model)
    own = StaticDecoder.__init__

    def planted(self: StaticDecoder, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        self._work = decoding.PlainRows()
        self.compute = plant(self)

    monkeypatch.setattr(StaticDecoder, "__init__", planted)
    assert answers(model) == expected
    assert caplog.text.count("answers are computed without a CUDA graph: its logits differ by") == 1
    monkeypatch.setattr(static_decoding, "LARGEST_DIFFERENCE", {torch.float32: float("inf")})
    assert answers(model) != expected


def test_positions_that_stand_still_show(static, monkeypatch):
    model = make_phi3()
    expected = answers(model)
    monkeypatch.setattr(torch.Tensor, "clamp_", lambda self, max: self.sub_(1))
    assert answers(model) != expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Offset increment")])
def test_a_recording_that_fails_leaves_answers_and_generators_as_they_are(static, monkeypatch, caplog, error):
    model = make_phi3()
    expected = answers(model)

    def fails(work: Any, device: Any, pool: Any) -> Any:
        torch.rand(3)
        raise error

    monkeypatch.setattr(graphs, "capture_for", lambda device: fails)
    state = torch.get_rng_state()
    assert answers(model) == answers(model) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert caplog.text.count("answers are computed without a CUDA graph: the step could not be recorded") == 1


def test_sampled_answers_are_those_of_the_plain_decoder(static, monkeypatch):
    model = make_phi3()
    settings = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "seed": 3, "batch_size": 3}
    mine = answers(model, **settings)
    assert static
    monkeypatch.setattr(static_decoding, "against", lambda facts: ["off"])
    assert answers(model, **settings) == mine
    assert answers(model, **settings | {"seed": 4}) != mine


def test_tokens_are_read_back_every_sixteen_steps_and_a_step_is_recorded_once(static, monkeypatch):
    counts: dict[str, int] = {"answer": 0, "compute": 0, "record": 0}

    def counted(name: str, own: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return own(*args, **kwargs)

        return call

    for name, attribute in (("answer", "answer"), ("compute", "compute"), ("record", "_record")):
        monkeypatch.setattr(StaticDecoder, attribute, counted(name, getattr(StaticDecoder, attribute)))
    model = make_phi3()
    monkeypatch.setattr("philora.generation.batches.stop_token_ids", lambda model, tokenizer: [])
    answers(model, PROMPTS[:2], max_new_tokens=40, batch_size=2)
    assert counts["answer"] == 3, "the first token is the prompt's; 39 steps"
    assert counts["record"] == 1
    assert counts["compute"] == 39 + 3, "repeated; and to compare twice, and to record once"


@torch.inference_mode()
def test_rows_move_in_place_while_their_number_filled_up_stays():
    decoder = StaticDecoder(make_phi3(), 5, 64)
    assert (decoder.rows, decoder.used) == (8, 5)
    decoder.prefill([[5], [6], [7], [8], [9]], range(5))
    decoder.step([1] * 5, [1] * 5)
    made, memory = decoder._recorded, decoder.cache[0][0]
    before = memory[3].clone()
    decoder.keep([3, 1], 1)
    assert decoder._recorded is made
    assert decoder.cache[0][0] is memory
    assert torch.equal(memory[0], before)
    assert decoder.step([1, 1, 0], [2, 2, 0]).shape[0] == 3
    decoder.keep([0])
    assert decoder.rows == 1
    assert decoder._recorded is None
    assert decoder.step([1], [3]).shape[0] == 1


def test_rows_are_filled_up():
    assert [filled_up(each) for each in (0, 1, 2, 8, 9, 64, 65, 130)] == [1, 1, 8, 8, 16, 64, 128, 192]


@torch.inference_mode()
def test_the_cache_doubles_and_the_step_is_recorded_again(monkeypatch):
    monkeypatch.setattr(static_decoding, "FIRST_TOKENS", 4)
    model = make_phi3()
    static, plain = StaticDecoder(model, 1, 100), decoding.Decoder(model, 1, 100)
    sizes = []
    for each in (static, plain):
        each.prefill([[5, 6, 7]], [0])
    for position in range(3, 40):
        found = static.step([position], [position])
        sizes.append(static.capacity)
        assert torch.allclose(found, plain.step([position], [position]), atol=1e-4)
    assert sorted(set(sizes)) == [4, 8, 16, 32, 64]


def test_a_conversation_takes_the_same_step(static, monkeypatch):
    """`chat` and `serve`: one answer by itself and several together, and again by transformers' cache."""
    lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
    model = optimize(get_peft_model(make_phi3(), lora)).eval()
    monkeypatch.setattr(conversation, "stop_token_ids", lambda model, tokenizer: [2, 50])
    monkeypatch.setattr(conversation, "Arrangement", lambda tokenizer: None)
    settings = GenerationSettings(max_new_tokens=NEW)

    def spoken(voices: AdapterPool) -> list[str]:
        return ["".join(voices.answer(each, settings, "mine")) for each in PROMPTS]

    by_graph = AdapterPool(model, Tokens(), "base", {"mine": "default"})
    mine = spoken(by_graph)
    assert len(static) == 1
    together = [by_graph.answer(each, settings, "mine") for each in PROMPTS]
    while any(each.finish is None for each in together):
        by_graph.step("mine", [each for each in together if each.finish is None])
    assert [each.text for each in together] == mine
    monkeypatch.setattr(static_decoding, "against", lambda facts: ["off"])
    assert spoken(AdapterPool(model, Tokens(), "base", {"mine": "default"})) == mine == by_transformers(model)


def test_which_answers_take_a_graph():
    assert against(GraphFacts()) == []
    a_cpu = GraphFacts(DeviceFacts(kind="cpu", name="a CPU"))
    assert against(a_cpu) == ["a graph needs a CUDA GPU, this is a CPU"]
    cases = {
        "switch": ("0", "PHILORA_GRAPHS=0"),
        "covered": (False, "transformers' generate"),
        "dtype": ("float16", "weights in float16"),
        "quantized": (True, "quantised layers"),
    }
    for name, (value, reason) in cases.items():
        (found,) = against(replace(GraphFacts(), **{name: value}))
        assert reason in found
    of_device = {
        "fused": (False, "PHILORA_FUSED=0"),
        "triton": (None, "Triton is not installed"),
        "capability": ((7, 5), "compute capability 7.5"),
    }
    for name, (value, reason) in of_device.items():
        (found,) = against(GraphFacts(replace(DeviceFacts(), **{name: value})))
        assert reason in found
    for name in ("dtype", "quantized"):
        assert against(replace(GraphFacts(), **{name: cases[name][0]}, switch="all")) == []


def test_check_says_how_answers_are_computed():
    card = DeviceFacts()
    assert answers_on(card, "bfloat16", quantized=False, covered=True) == "a CUDA graph for each token"
    assert "quantised layers" in answers_on(card, "bfloat16", quantized=True, covered=True)
    assert "generate" in answers_on(card, "bfloat16", quantized=False, covered=False)
    assert answers_on(replace(card, kind="cpu"), "bfloat16", quantized=False, covered=True) == ""
    shown = str(Hardware("a", 0, "stack", ("b",), "flash", "c", "liger (d)", "e"))
    assert shown.endswith("decoder layers: stack (b); attention: flash (c); norms and SwiGLU: liger (d); answers: e")


def test_the_size_of_a_row_of_the_cache():
    assert [cache_tokens(each, 10_000) for each in (1, 256, 257, 5000, 9000)] == [256, 256, 512, 8192, 10_048]
    assert cache_tokens(300, 400) == 448
    decoder = StaticDecoder(make_phi3(), 3, 100)
    decoder.prefill([[5, 6, 7]], [0])
    assert (decoder.rows, decoder.capacity) == (filled_up(3), cache_tokens(3, 100))


def test_a_cpu_keeps_its_decoder(monkeypatch):
    model = make_phi3()
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    assert type(static_decoding.decoder_for(model, 2, 32)) is decoding.Decoder
    assert static_decoding.facts_of(model).covered
    assert not static_decoding.facts_of(copy.deepcopy(model).half()).quantized


def first_difference(model: Any, prompt: list[int], mine: list[int], theirs: list[int]) -> float:
    """How far apart the logits of the two tokens are where answers first differ, relative to the largest; 0: nowhere.

    A greedy answer in bf16 may take another token where two are as likely as bf16 can tell; what follows then differs.
    Where one answer is over and the other is not, it took a stop token.
    """
    for at, (own, other) in enumerate(zip_longest(mine, theirs)):
        if own != other:
            ids = torch.tensor([prompt + theirs[:at]], device=model.device)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
            pair = [logits[[2, 50]].max() if each is None else logits[each] for each in (own, other)]
            return float((pair[0] - pair[1]).abs() / logits.abs().max())
    return 0.0


def assert_same_but_for_ties(model: Any, mine: list[str], theirs: list[str], tolerance: float) -> None:
    for prompt, own, other in zip(PROMPTS, mine, theirs, strict=True):
        split = [list(map(int, each.split())) for each in (own, other)]
        assert first_difference(model, prompt, *split) <= tolerance, (own, other)


@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_in_bf16_the_static_step_answers_as_transformers_but_for_ties(static, adapter):
    model = make_phi3().bfloat16()
    if adapter:
        lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
        model = optimize(get_peft_model(model, lora)).eval()
    expected = by_transformers(model)
    assert_same_but_for_ties(model, answers(model, batch_size=3), expected, LOGITS_BF16)
    assert static
    planted = [" ".join(str((int(each) + 7) % 97) for each in answer.split()) for answer in expected]
    with pytest.raises(AssertionError):
        assert_same_but_for_ties(model, planted, expected, LOGITS_BF16)
    with pytest.raises(AssertionError):
        assert_same_but_for_ties(model, [each.rpartition(" ")[0] for each in expected], expected, LOGITS_BF16)


@pytest.fixture
def recorded(monkeypatch):
    """What was recorded: a graph, or None where that failed."""
    made = []
    own = StaticDecoder._record
    monkeypatch.setattr(StaticDecoder, "_record", lambda self: (own(self), made.append(self._recorded))[0])
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_on_a_gpu_the_graph_in_bf16_answers_as_transformers_but_for_ties(recorded, adapter, batch_size):
    model = make_phi3(hidden_size=128, intermediate_size=256).bfloat16()
    if adapter:
        lora = LoraConfig(target_modules="all-linear", r=4, lora_alpha=8, init_lora_weights=False)
        model = get_peft_model(model, lora)
    model = optimize(model.cuda()).eval() if adapter else model.cuda()
    assert_same_but_for_ties(model, answers(model, batch_size=batch_size), by_transformers(model), LOGITS_BF16)
    assert recorded, "bf16 takes a graph by default"
    assert None not in recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu_the_graph_gives_the_tokens_of_the_plain_step(monkeypatch, recorded):
    model = make_phi3(hidden_size=128, intermediate_size=256).cuda()
    expected = answers(model, batch_size=3)
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    assert answers(model, batch_size=3) == expected
    assert recorded
    assert None not in recorded
