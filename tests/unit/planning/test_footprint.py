"""What autograd keeps of a step beside the planner's formula; bytes of the base and of the optimizers."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import philora
from philora.configuration.sections import ModelConfig
from philora.generation import decoding
from philora.kernels.modules import only_rows
from philora.models.loading import bf16_is_fast
from philora.planning.footprint import footprint, optimizer_bytes

LENGTHS = [170, 220, 130, 200, 225, 188, 147]
TOKENS = sum(LENGTHS)
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3}


def adapted(model, **changes):
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.1} | changes
    return philora.get_peft_model(model, LoraConfig(**settings)).train()


def counted(model, dtype=torch.float32, **changes):
    settings = ModelConfig(name_or_path="nano", dtype=str(dtype).removeprefix("torch."), **changes)
    return footprint(model, settings, "adamw_torch_fused", "cpu")


def kept_bytes(model, wanted):
    """Of all tensors that autograd saves in a forward pass, each storage once, but the weights."""
    known = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point() | (
            tensor.dtype in (torch.int16, torch.uint8)
        ):
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(each) for each in LENGTHS])[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), only_rows(wanted, TOKENS):
        hidden = model.get_base_model().model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        loss = hidden.float().sum()
    total = sum(held.values())
    loss.backward()
    return total


def formula_bytes(found, recomputation, labelled):
    """The formula's, without what only the trainer's step has: ids, and the last norm's output for the head."""
    copies = 0 if found.element_bytes == 4 else found.trainable * found.element_bytes
    ours = found._activations(TOKENS, recomputation, labelled) + copies
    return ours - TOKENS * (found.hidden * found.element_bytes + 4 * 8 - 4)


@pytest.mark.parametrize("labelled", [1.0, 0.4])
@pytest.mark.parametrize("recomputation", ["none", "elementwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_backward_needs(phi3, dtype, recomputation, labelled):
    model = adapted(phi3(**SHAPE, max_position_embeddings=256).to(dtype))
    philora.optimize(model, recomputation=recomputation)
    wanted = (torch.arange(TOKENS) < labelled * TOKENS).nonzero().flatten()
    found = counted(model, dtype)
    measured, ours = kept_bytes(model, wanted), formula_bytes(found, recomputation, labelled)
    # Not in the formula: as many as 63 rows that fill a product up, and a mean of 2.5 numbers a row. On a
    # processor without bf16 instructions 2.7% and 3.6% less than the formula were measured where labels are few.
    rel = 0.01 if dtype == torch.float32 or labelled == 1.0 or bf16_is_fast() else 0.04
    assert ours == pytest.approx(measured, rel=rel)
    other = "none" if recomputation == "elementwise" else "elementwise"
    with pytest.raises(AssertionError):  # negative control: the other grade
        assert formula_bytes(found, other, labelled) == pytest.approx(measured, rel=0.01)


def test_split_projections_are_near():
    config = LlamaConfig(
        vocab_size=97, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **SHAPE
    )
    model = adapted(LlamaForCausalLM(config).bfloat16())
    measured = kept_bytes(model, torch.ones(1, TOKENS, dtype=torch.bool))
    # transformers' own rotary embedding and SwiGLU keep what the fast ones do not; the estimate is a little above
    assert formula_bytes(counted(model, torch.bfloat16), "none", 1.0) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("how", "bits"), [("none", 16), ("nf4", 4.127), ("int8", 8.0)])
def test_bytes_of_the_base(phi3, how, bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = phi3(**SHAPE, vocab_size=1024).bfloat16()
    linear = sum(each.numel() for name, each in model.named_parameters() if "proj" in name)
    rest = sum(each.numel() for each in model.parameters()) - linear
    rows = sum(each.shape[0] for name, each in model.named_parameters() if "proj" in name) if how == "int8" else 0
    found = counted(adapted(model), torch.bfloat16, quantization=how)
    assert found.parameters == linear + rest
    assert found.weights == pytest.approx(linear * bits / 8 + rest * 2 + rows * 4, rel=1e-3)
    assert found.quantized_matrix == (0 if how == "none" else 2 * 352 * 128)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_states_of_the_optimizers(optim, tmp_path):
    """As the optimizers of transformers make them, for a matrix and a vector."""
    from transformers import Trainer, TrainingArguments

    layer = torch.nn.Linear(300, 200)
    trainer = Trainer(layer, TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to=[]))
    optimizer = trainer.create_optimizer()
    for each in layer.parameters():
        each.grad = torch.ones_like(each)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    measured = sum(each.numel() * each.element_size() for each in states if each.numel() > 1)
    assert sum(optimizer_bytes(optim, each.shape) for each in layer.parameters()) == measured


def test_eight_bits_of_a_state():
    shape = torch.Size((256, 64))
    assert optimizer_bytes("adamw_torch_fused", shape) == optimizer_bytes("paged_adamw_32bit", shape) == 8 * 16384
    assert optimizer_bytes("paged_adamw_8bit", shape) == 2 * (16384 + 4 * 64)
    assert optimizer_bytes("adamw_8bit", torch.Size((63, 65))) == 8 * 63 * 65, "below 4096 elements states are fp32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_generation_reorders(phi3, dtype, monkeypatch):
    """What `Decoder` really packs, with an adapter, beside the planner's count; fp32 has none."""
    packed = []
    pack = decoding.Packing._packed

    def recorded(self, weight):
        found = pack(self, weight)
        packed.append(0 if found is None else weight.nbytes)
        return found

    monkeypatch.setattr(decoding.Packing, "_packed", recorded)
    model = adapted(phi3(**SHAPE).to(dtype))
    with torch.no_grad():
        decoding.Decoder(model.eval(), 2, 8)
    bf16 = decoding.packs(model, "cpu", torch.bfloat16)  # whether this processor has the product
    assert counted(model, dtype).packed == sum(packed)
    assert bool(sum(packed)) == (bf16 and dtype == torch.bfloat16)
    assert not decoding.packs(LlamaForCausalLM(LlamaConfig(**SHAPE, num_attention_heads=4)), "cpu", torch.bfloat16)


def test_no_weights_are_reordered_where_memory_is_short(phi3, monkeypatch):
    model = phi3(**SHAPE).bfloat16().eval()
    if not decoding.packs(model, "cpu", torch.bfloat16):
        pytest.skip("the processor has no such product")
    needed = counted(adapted(phi3(**SHAPE).bfloat16(), r=1), torch.bfloat16).packed
    for free, packs in ((int(2.1 * needed), True), (int(1.5 * needed), False)):
        monkeypatch.setattr(decoding, "free_bytes", lambda device, free=free: free)
        assert decoding.Packing(model, 1).on is packs
