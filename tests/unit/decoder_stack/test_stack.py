"""The decoder stack against plain PEFT and transformers, in fp32 through Triton's interpreter."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

pytest.importorskip("triton")

import philora
from philora import optimize
from philora.decoder_stack import layer, products, stack, trial
from philora.decoder_stack.facts import facts_of_model
from philora.decoder_stack.model import StackedPhi3Model, choose, configure, dropout_state, set_dropout_state
from philora.kernels import varlen
from philora.kernels.layout import PackedLayout
from tests.conftest import make_phi3
from tests.stacked import DEVICE, LENGTHS, SEED, by_peft, by_stack, inputs, largest_difference, make, positions
from tests.tolerances import GRADIENTS_FP32, QUANTIZED_FP32

NEEDS_CARD = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA GPU")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []  # on a CPU through the interpreter
# A card multiplies in fp8 by rows into bf16 alone.
FP8_DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.fixture(autouse=True)
def _everything_that_is_there(monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "all")


@pytest.fixture
def nodes(monkeypatch):
    """The layers that ran as one node."""
    seen = []
    run = layer.DecoderLayer.__call__
    monkeypatch.setattr(layer.DecoderLayer, "__call__", lambda self, *a: (seen.append(self.index), run(self, *a))[1])
    return seen


@pytest.mark.parametrize(
    ("recomputation", "on_host", "layers"),
    [("none", False, 2), ("elementwise", False, 1), ("full", False, 1), ("full", True, 2)],
)
def test_every_way_of_keeping_gives_the_gradients_of_peft(nodes, recomputation, on_host, layers):
    made = make(layers=layers, dropout=0.25, rope_parameters=ROTARY)
    theirs = by_peft(made)
    mine = by_stack(made, recomputation=recomputation, inputs_on_host=on_host)
    assert nodes == list(range(layers))
    assert largest_difference(mine, theirs) < GRADIENTS_FP32
    assert len(theirs) == 2 + 8 * layers


def test_what_is_computed_again_leaves_out_the_product_that_nothing_reads(monkeypatch):
    made = make(layers=2)
    forward, calls = products.PlainProduct.forward, []
    monkeypatch.setattr(
        products.PlainProduct, "forward", lambda self, *given: (calls.append(self), forward(self, *given))[1]
    )
    by_stack(made)
    assert len(calls) == 2 * 4
    calls.clear()
    by_stack(made, recomputation="full")
    assert len(calls) == 2 * 4 + 2 * 3


def test_embeddings_that_are_part_of_wider_rows(nodes):
    made = make()
    theirs = by_peft(made)
    optimize(made)
    decoder = made.get_base_model().model
    configure(made, seed=SEED, counter=0)
    x = inputs(made)[0]
    wide = torch.cat([x, torch.ones_like(x)], -1)[..., : x.shape[-1]]
    output = decoder(inputs_embeds=wide, position_ids=positions(), use_cache=False)[0]
    assert nodes == [0]
    assert largest_difference({"output": output.detach()}, {"output": theirs["output"]}) < GRADIENTS_FP32


def _window(_):
    return {"sliding_window": 3}, {}


def _longrope(_):
    factors = {"short_factor": [1.0, 1.2], "long_factor": [4.0, 9.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, **factors}
    return {
        "rope_parameters": rope | {"original_max_position_embeddings": 3},
        "original_max_position_embeddings": 3,
    }, {}


def _norms(_):
    return {}, {"modules_to_save": ["input_layernorm", "post_attention_layernorm"]}


def _some(_):
    return {}, {"target_modules": ["qkv_proj", "down_proj"], "use_rslora": True}


@pytest.mark.parametrize("case", [_window, _longrope, _norms, _some], ids=lambda each: each.__name__[1:])
def test_members_and_adapters(nodes, case):
    config, lora = case(None)
    made = make(dropout=0.25 if case is _norms else 0.0, lora=lora, **config)
    theirs = by_peft(made)
    assert largest_difference(by_stack(made), theirs) < GRADIENTS_FP32
    assert nodes == [0]
    if case is _norms:
        assert sum("layernorm" in name for name in theirs) == 2


def test_adapters_in_bf16_have_their_gradients_rounded_once(nodes):
    made = make()
    for name, each in made.named_parameters():
        each.data = each.data.bfloat16().float() if "lora_" in name else each.data
    theirs = by_peft(made)
    for name, each in made.named_parameters():
        each.data = each.data.bfloat16() if "lora_" in name else each.data
    mine = by_stack(made)
    assert nodes == [0]
    own = {name for name in theirs if "lora_" in name}
    assert (
        largest_difference({n: mine[n] for n in mine if n not in own}, {n: theirs[n] for n in theirs if n not in own})
        < GRADIENTS_FP32
    )
    assert 0 < largest_difference({n: mine[n] for n in own}, {n: theirs[n] for n in own}) < 2**-8


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_over_a_quantised_base(nodes, tmp_path, scheme):
    pytest.importorskip("bitsandbytes")
    from philora.configuration.sections import ModelConfig
    from philora.kernels.quantization import dequantize_
    from philora.models.loading import load_model

    make_phi3(num_hidden_layers=1, hidden_size=64, intermediate_size=96).save_pretrained(tmp_path)
    settings = ModelConfig(name_or_path=str(tmp_path), quantization=scheme, dtype="float32")
    made = make(base=load_model(settings))
    # Over the dequantised weights: bitsandbytes' own forward over an int8 base rounds activations on a card.
    plain = load_model(settings).to(DEVICE)
    dequantize_(plain)
    reference = make(base=plain)
    reference.load_state_dict({name: each for name, each in made.state_dict().items() if "lora_" in name}, strict=False)
    theirs = by_peft(reference)
    mine = by_stack(made)
    assert nodes == [0]
    assert made.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.dtype in (torch.uint8, torch.int8)
    assert largest_difference(mine, theirs) < QUANTIZED_FP32
    weight = plain.model.layers[0].mlp.down_proj.base_layer.weight
    weight.data[0] *= 1.1  # a planted fault: one row of one matrix
    assert largest_difference(mine, by_peft(reference)) > 10 * QUANTIZED_FP32


def test_products_in_fp8_come_near_and_each_gradient_is_rounded_by_the_kernel_that_made_it(nodes, monkeypatch):
    made = make(layers=2).to(FP8_DTYPE)
    theirs = by_peft(made, dtype=FP8_DTYPE)
    alone = []
    quantize = layer.kernels.quantize
    monkeypatch.setattr(layer.kernels, "quantize", lambda x: (alone.append(x.shape), quantize(x))[1])
    mine = by_stack(made, dtype=FP8_DTYPE, fp8=True)
    assert nodes == [0, 1]
    # 3 bits of mantissa; on an H200 bf16's gradients were 0.2 to 0.28 away. The interpreter rounds some to half.
    # bf16's own rounding, 8 bits in ten results in a row, is a tenth of that.
    assert 1e-3 < largest_difference(mine, theirs) < 1.0
    assert float((mine["output"] - theirs["output"]).float().norm() / theirs["output"].float().norm()) < 0.2
    assert len(alone) == 2 + 1  # the heads of each layer; of the gradients the first one alone


# ------------------------------------------------------------------------------------------------ planted faults


def _scaling(monkeypatch):
    cast = stack.DecoderStack._cast_adapters

    def wrong(self):
        cast(self)
        for each in self._adapters:
            each.working_up.mul_(1.01)

    monkeypatch.setattr(stack.DecoderStack, "_cast_adapters", wrong)


def _window_of_one_more(monkeypatch):
    init = varlen.Attention.__init__
    monkeypatch.setattr(
        varlen.Attention,
        "__init__",
        lambda self, layout, scaling, window=None, sure=True: init(self, layout, scaling, window and window + 1, sure),
    )


def _another_mask_in_backward(monkeypatch):
    gradients = layer._gradients

    def wrong(own, shared, *rest, **options):
        shared.dropouts = [each._replace(seed=each.seed + 1) for each in shared.dropouts]
        return gradients(own, shared, *rest, **options)

    monkeypatch.setattr(layer, "_gradients", wrong)


def _one_document(monkeypatch):
    of_positions = PackedLayout.of_positions
    monkeypatch.setattr(
        PackedLayout, "of_positions", lambda each: of_positions(torch.arange(each.numel(), device=DEVICE)[None])
    )


@pytest.mark.parametrize(
    "fault", [_scaling, _window_of_one_more, _another_mask_in_backward, _one_document], ids=lambda each: each.__name__
)
def test_a_planted_fault_is_found(monkeypatch, fault):
    made = make(dropout=0.25, sliding_window=3)
    theirs = by_peft(made)
    fault(monkeypatch)
    assert largest_difference(by_stack(made), theirs) > 100 * GRADIENTS_FP32


def test_the_factors_of_the_longest_document_for_all_are_found(monkeypatch):
    config, _ = _longrope(None)
    made = make(**config)
    theirs = by_peft(made)
    from philora.kernels import rotary

    monkeypatch.setattr(rotary, "document_tokens", lambda positions, mask: torch.full_like(positions, max(LENGTHS)))
    assert largest_difference(by_stack(made), theirs) > 100 * GRADIENTS_FP32


# ------------------------------------------------------------------------------------------------- in the model


def test_bounds_from_the_batch_are_taken_and_nothing_is_read_from_the_device(monkeypatch, nodes):
    made = philora.optimize(make())
    decoder = made.get_base_model().model
    bounds = torch.tensor([0, 1, 5, 7], dtype=torch.int32, device=DEVICE)
    x, _ = inputs(made)
    packed = {"inputs_embeds": x, "position_ids": positions(), "use_cache": False}
    with_positions = decoder(**packed)[0]
    monkeypatch.setattr(PackedLayout, "of_positions", None)
    given = decoder(**packed, cu_seq_lens_q=bounds, max_length_q=4, cu_seq_lens_k=bounds, max_length_k=4)[0]
    assert torch.equal(given, with_positions)
    assert nodes == [0, 0]


def test_what_the_stack_does_not_cover_runs_the_modules(nodes):
    made = philora.optimize(make())
    decoder = made.get_base_model().model
    x, _ = inputs(made)
    packed = {"inputs_embeds": x, "position_ids": positions(), "use_cache": False}
    with torch.no_grad():
        decoder(**packed)
    assert len(decoder(**packed, output_hidden_states=True).hidden_states) == 2
    decoder(inputs_embeds=x, attention_mask=torch.ones(1, sum(LENGTHS), device=DEVICE), use_cache=False)
    handle = decoder.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    decoder(**packed)
    handle.remove()
    made.disable_adapter_layers()
    decoder(**packed)
    assert nodes == []
    made.enable_adapter_layers()
    decoder(**packed)
    assert nodes == [0]


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about a CPU")
def test_without_the_switch_a_cpu_runs_the_modules(monkeypatch, nodes):
    monkeypatch.delenv("PHILORA_STACK")
    made = philora.optimize(make())
    x, _ = inputs(made)
    packed = {"inputs_embeds": x, "position_ids": positions(), "use_cache": False}
    made.get_base_model().model(**packed)
    choice = choose(made.get_base_model().model, packed, "everything", facts_of_model(made.get_base_model().model))
    assert nodes == []
    assert "needs a CUDA GPU" in str(choice)


def test_names_copies_and_pickles_stay(nodes):
    made = make()
    names = list(made.state_dict())
    philora.optimize(made)
    decoder = made.get_base_model().model
    assert type(decoder) is StackedPhi3Model
    assert list(made.state_dict()) == names
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        configure(other, deterministic=False)
        assert decoder.stack_settings.deterministic
        x, _ = inputs(other)
        other.get_base_model().model(inputs_embeds=x, position_ids=positions(), use_cache=False)
    assert nodes == [0, 0]


def test_weights_that_were_moved_are_read_where_they_are():
    made = make()
    plain = copy.deepcopy(made)
    before = by_stack(made)
    for each in (made, plain):
        weight = each.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight
        weight.data = 2 * weight.data
    theirs = by_peft(plain)
    assert largest_difference(by_stack(made), theirs) < GRADIENTS_FP32
    assert largest_difference(before, theirs) > 1e-2, "negative control"


def test_adapters_that_change_make_a_new_stack():
    made = make()
    first = by_stack(made)
    made.delete_adapter("default")
    made.add_adapter("default", copy.deepcopy(make(lora={"r": 2}).peft_config["default"]))
    made.set_adapter("default")
    theirs = by_peft(made)
    mine = by_stack(made)
    assert largest_difference(mine, theirs) < GRADIENTS_FP32
    assert not torch.equal(mine["output"], first["output"])


def test_masks_go_on_where_a_checkpoint_left_them():
    made = philora.optimize(make(dropout=0.25))
    x, _ = inputs(made)

    def run(count):
        decoder = made.get_base_model().model
        return [decoder(inputs_embeds=x, position_ids=positions(), use_cache=False)[0].detach() for _ in range(count)]

    configure(made, seed=11)
    first, second = run(2)
    assert not torch.equal(first, second)
    state = dropout_state(made)
    (third,) = run(1)
    set_dropout_state(made, state)
    (again,) = run(1)
    assert torch.equal(third, again)


def test_two_forward_passes_before_backward_keep_their_own_masks():
    made = make(dropout=0.25)
    alone = by_stack(made)
    decoder = made.get_base_model().model
    configure(made, seed=5, counter=0)
    set_dropout_state(made, {"seed": 5, "counter": 0})
    x, grad = inputs(made)
    leaf = x.requires_grad_()
    packed = {"inputs_embeds": leaf, "position_ids": positions(), "use_cache": False}
    output = decoder(**packed)[0]
    decoder(**packed)
    output.backward(grad)
    assert torch.equal(leaf.grad, alone["input"])


def test_a_model_that_has_trained_is_freed(nodes):
    made = make()
    decoder = weakref.ref(made.get_base_model().model)
    by_stack(made)
    assert nodes == [0]
    del made
    gc.collect()
    assert decoder() is None


def test_a_second_derivative_is_refused():
    made = philora.optimize(make())
    x, _ = inputs(made)
    leaf = x.requires_grad_()
    output = made.get_base_model().model(inputs_embeds=leaf, position_ids=positions(), use_cache=False)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(output.sum(), leaf, create_graph=True)


def test_a_plain_phi3_has_no_adapter_for_the_stack():
    plain = philora.optimize(make_phi3())
    given = {"inputs_embeds": torch.ones(1, 3, 32)}
    assert "there is no adapter" in str(choose(plain.model, given, "everything", facts_of_model(plain.model)))


# ------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@NEEDS_CARD
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_in_bf16_the_card_agrees_with_peft(dropout):
    found = trial.compare(torch.device("cuda"), torch.bfloat16, 96, dropout)
    assert max(found) < trial.LARGEST_DIFFERENCE["bfloat16"]


@pytest.mark.gpu
@NEEDS_CARD
@pytest.mark.parametrize("deterministic", [True, False])
def test_repeated_steps_have_the_same_bits(deterministic):
    made = make(layers=2, hidden_size=128, head_dim=32).to(torch.bfloat16)
    lengths = (300, 700, 24)
    runs = [by_stack(made, lengths, torch.bfloat16, deterministic=deterministic) for _ in range(4)]
    same = all(torch.equal(runs[0][name], run[name]) for run in runs[1:] for name in runs[0])
    assert same or not deterministic


@pytest.mark.gpu
@NEEDS_CARD
def test_inputs_in_pinned_memory_come_back_whole():
    made = make(layers=4, hidden_size=128, head_dim=32)
    kept = by_stack(made, (300, 700), recomputation="full")
    assert largest_difference(by_stack(made, (300, 700), recomputation="full", inputs_on_host=True), kept) == 0
