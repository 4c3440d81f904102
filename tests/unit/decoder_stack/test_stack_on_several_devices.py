"""The decoder stack on several devices: accelerate's hooks, what moves with the layers, and DDP around it.

Where there is one device, the meta device stands for the other.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module

pytest.importorskip("triton")

from philora import optimize
from philora.decoder_stack import graphs
from philora.decoder_stack import model as stacked
from philora.decoder_stack.choice import BatchFacts, DeviceFacts, stack_for
from philora.decoder_stack.facts import facts_of_model, only_moves
from philora.decoder_stack.layer import DecoderLayer, Pass
from philora.decoder_stack.rows import Dropout
from philora.decoder_stack.stack import DecoderStack
from philora.kernels import graphs as cuda_graphs
from philora.kernels.layout import PackedLayout
from philora.kernels.varlen import Attention
from tests.stacked import DEVICE, by_peft, by_stack, inputs, largest_difference, make, positions
from tests.tolerances import GRADIENTS_FP32

META = torch.device("meta")
LENGTHS = (2, 1)


@pytest.fixture(autouse=True)
def _everything_that_is_there(monkeypatch):
    monkeypatch.setenv("PHILORA_STACK", "all")


def facts(model):
    return facts_of_model(model.get_base_model().model)


def test_hooks_of_a_device_map_keep_the_stack(monkeypatch):
    made = make()
    theirs = by_peft(made, LENGTHS)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    dispatch_model(made.get_base_model(), dict.fromkeys(parts, DEVICE.type), main_device=DEVICE.type, force_hooks=True)
    decoder = made.get_base_model().model
    assert "forward" in vars(decoder.layers[0])
    assert facts(made).hooks == ()
    ran = []
    call = DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda self, *a: (ran.append(self.index), call(self, *a))[1])
    assert largest_difference(by_stack(made, LENGTHS), theirs) < GRADIENTS_FP32
    assert ran == [0]


def test_other_hooks_of_accelerate_leave_it():
    assert only_moves(AlignDevicesHook("cpu"))
    for hook in (None, ModelHook(), AlignDevicesHook("cpu", offload=True), SequentialHook(AlignDevicesHook("cpu"))):
        assert not only_moves(hook)
    made = make()
    add_hook_to_module(made.get_base_model().model.layers[0].mlp, ModelHook())
    assert facts(made).hooks == ("Phi3MLP",)


def test_layers_on_several_gpus_wait_for_the_switch_and_shards_take_the_modules():
    made = make()
    found = facts(made)
    assert not found.sharded
    next(made.get_base_model().model.layers[0].parameters()).ds_id = 0  # as ZeRO-3 marks what it shards
    assert facts(made).sharded
    for name, value, reason in (("devices", 2, "layers on several devices"), ("sharded", True, "in shards")):
        choice = stack_for(found.__class__(**{name: value}), BatchFacts(), DeviceFacts())
        assert choice.path == "modules"
        assert reason in str(choice)


def shared(**changes):
    attention = Attention(PackedLayout.of_lengths(LENGTHS, torch.tensor([-100, 4, 5])), 0.5, 2)
    seed = torch.tensor([3])
    return Pass(attention, torch.ones(3, 4), torch.ones(3, 4), [Dropout(seed, 0.5), None], **changes)


def test_everything_of_a_pass_goes_to_the_device_of_its_layers():
    here = shared(keep="input", handed_down=object())
    there = here.on(META)
    layout = there.attention.layout
    moved = [there.cos, there.sin, there.dropouts[0].seed, layout.bounds, layout.position_ids, layout.label_rows]
    assert {each.device for each in moved} == {META}
    assert (there.keep, there.dropouts[1], there.handed_down) == ("input", None, None)
    assert (there.attention.scaling, there.attention.window_tokens, layout.longest_tokens) == (0.5, 2, 2)
    assert here.on(torch.device("cpu")) is here


def test_each_layer_gets_its_inputs_and_the_pass_on_its_own_device(monkeypatch):
    made = optimize(make(layers=3))
    stack = DecoderStack(made.get_base_model().model, torch.float32)
    places = [DEVICE, META, META]
    monkeypatch.setattr(DecoderLayer, "device", property(lambda self: places[self.index]))
    seen = []

    def call(self, each, x, h):
        seen.append((x.device, None if h is None else h.device, each.cos.device, id(each)))
        return x * 1.0, x * 2.0

    monkeypatch.setattr(DecoderLayer, "__call__", call)
    x, ones = inputs(made, LENGTHS)[0][0].requires_grad_(), torch.ones(3, 4, device=DEVICE)
    residual, added = stack(x, ones, ones, PackedLayout.of_lengths(LENGTHS).to(DEVICE))
    here = x.device
    assert [each[:3] for each in seen] == [(here, None, here), (META, META, META), (META, META, META)]
    assert seen[1][3] == seen[2][3], "one pass for a device"
    assert residual.device == added.device == META


def test_ddp_sums_the_gradients_of_graphs(monkeypatch):
    """One process: its gradients go through DDP's reducer and are what they are without it."""
    monkeypatch.setattr(graphs, "EVEN_TOKENS", 4)
    monkeypatch.setattr(graphs, "LAYOUTS", ((3, 2),))
    monkeypatch.setattr(graphs, "against", lambda each: [])
    monkeypatch.setattr(cuda_graphs, "capture_for", lambda device: cuda_graphs.repeat)
    made = optimize(make())
    decoder = made.get_base_model().model
    x, grad = inputs(made, LENGTHS)

    def gradients(module):
        for _ in range(2):
            output = module(inputs_embeds=x, position_ids=positions(LENGTHS), use_cache=False)[0]
            output.backward(grad)
        found = {name: each.grad.clone() for name, each in decoder.named_parameters() if each.grad is not None}
        decoder.zero_grad()
        return found

    expected = gradients(decoder)
    monkeypatch.setenv("PHILORA_GRAPHS", "all")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = gradients(torch.nn.parallel.DistributedDataParallel(decoder))
    finally:
        torch.distributed.destroy_process_group()
    assert len(stacked._runners[decoder].made) == 1
    assert largest_difference(found, expected) < GRADIENTS_FP32
