"""The random state that is kept is that of the device that a tensor is on, not of the current device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from philora.lora import functional
from philora.lora.recomputation import random_state, set_random_state
from philora.training.microbatches import devices_of


class Generators:
    """Two GPUs' generators, of which the first is current; stands in for `torch.cuda`."""

    def __init__(self):
        self.states = [torch.tensor([10], dtype=torch.uint8), torch.tensor([20], dtype=torch.uint8)]

    def _at(self, device):
        return 0 if device is None or device.index is None else device.index

    def get_rng_state(self, device=None):
        return self.states[self._at(device)].clone()

    def set_rng_state(self, state, device=None):
        self.states[self._at(device)] = state.clone()


@pytest.fixture
def generators(monkeypatch):
    made = Generators()
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    return made


def test_each_device_has_its_own(generators):
    first, second = (torch.device("cuda", index) for index in range(2))
    assert [int(random_state(each)) for each in (first, second)] == [10, 20]
    set_random_state(second, torch.tensor([7], dtype=torch.uint8))
    assert [int(each) for each in generators.states] == [10, 7]


def test_a_mask_is_drawn_again_from_its_tensors_generator(generators, monkeypatch):
    """The stand-in draws its state as the mask, and moves it on."""
    x = SimpleNamespace(device=torch.device("cuda", 1))

    def draw(x, p, packed):
        state = generators.states[x.device.index]
        generators.states[x.device.index] = state + 1
        return state, 1.0

    monkeypatch.setattr(functional, "_keep_mask", draw)
    drawn = functional._Redraw(random_state(x.device), 0.5, False)
    first = draw(x, 0.5, False)[0]
    assert torch.equal(drawn.mask(x), first)
    assert [int(each) for each in generators.states] == [10, 21], "what came after is as it was"


def test_a_step_keeps_the_states_of_all_devices_of_a_model():
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("meta")]

    class Spread(nn.Module):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=each) for each in devices])

    assert devices_of(Spread()) == {*devices[:2], torch.device("cpu")}
    assert devices_of(nn.Linear(2, 2)) == {torch.device("cpu")}


def test_the_cpu():
    state = random_state(torch.device("cpu"))
    first = torch.rand(3)
    set_random_state(torch.device("cpu"), state)
    assert torch.equal(torch.rand(3), first)
