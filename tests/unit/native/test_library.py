"""The compiled functions: what their callers' tests do not see."""

from __future__ import annotations

import pytest
import torch

from philora.lora import functional
from philora.native import build
from philora.native import library as native

pytestmark = pytest.mark.skipif(not build.available(), reason="no compiler")


def philox(counter: int, key: int, rounds: int) -> list[int]:
    """Philox4x32 by its definition (Salmon et al., 2011)."""
    low = 0xFFFFFFFF
    c = [counter >> 32 * i & low for i in range(4)]
    k = [key & low, key >> 32]
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & low, (first >> 32) ^ c[3] ^ k[1], first & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def unpacked(words: torch.Tensor) -> torch.Tensor:
    return ((words[..., None] >> torch.arange(16, dtype=torch.int16)) & 1).view(len(words), -1)


def test_dropout_takes_its_bits_from_philox():
    # the published vectors of ten rounds: the definition above is the published one
    assert philox(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    torch.manual_seed(5)
    words = native.keep_bits(3, 100, 20000)
    torch.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64).random_(0, None))
    bits = unpacked(words).flatten().tolist()
    for index, bit in enumerate(bits):
        lane, half = index // 8, index % 8
        word = philox(lane, seed, 7)[half // 2]
        assert bit == int((word >> 16 if half % 2 else word & 0xFFFF) >= 20000), index


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 61, 2816])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_keep_and_add(columns, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, columns).to(dtype)
    words = native.keep_bits(9, columns, 2**15)
    mask = unpacked(words)[:, :columns].to(dtype)
    assert torch.equal(native.keep(x, words), x * mask)
    wanted = y + x * mask
    native.add_kept_(y, x, words)
    assert torch.equal(y, wanted)
    if columns > 60:
        assert not torch.equal(native.keep(x, words), x * mask.roll(1, 1))  # negative control


def test_nothing_depends_on_the_number_of_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(70, 96).bfloat16(), torch.rand(48).bfloat16()
    qkv = torch.randn(300, 9, 32).bfloat16()
    starts, lengths = torch.tensor([130, 0, 290]), torch.tensor([160, 130, 10])
    cos, sin = torch.randn(2, 300, 16)

    def everything():
        torch.manual_seed(1)
        found = list(native.rms_norm(x[:, :48].contiguous(), weight, 1e-5))
        heads = qkv.split([4, 2, 2, 1], 1)[:3]
        if native.attends(heads, 0.2):  # the processor has instructions for bf16
            causal = native.Causal(starts, lengths, (cos, sin), None, 0.2)
            output, normaliser = native.attend(heads, causal)
            results = [torch.zeros_like(qkv[:, :n]) for n in (4, 2, 2)]
            plain = [each.contiguous() for each in heads]
            native.attend_backward(plain, causal, (output, normaliser), output.flip(0).contiguous(), results)
            found += [output, normaliser, *results]
        return [native.keep_bits(70, 96, 99), native.swiglu(x), *found]

    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_not_a_number_stays_one():
    x = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]]).bfloat16()
    assert native.keep(x, torch.full((1, 1), -1, dtype=torch.int16)).isnan().tolist() == [[False, True, False, False]]
    got = native.swiglu(torch.cat([x, torch.ones_like(x)], 1))
    torch.testing.assert_close(got, torch.nn.functional.silu(x), equal_nan=True)
    assert native.rms_norm(x, torch.ones(4).bfloat16(), 1e-5)[0].isnan().any()
    scores = [torch.empty(1) for _ in range(3)]
    native.score_rows_(x, None, torch.tensor([0]), scores, False)
    assert scores[0].isnan().all()


def test_the_largest_and_smallest_numbers():
    x = torch.tensor([[3e38, -3e38, 1e-40, 88.0, -88.0, 300.0, -300.0, 0.0]])
    got = native.swiglu(torch.cat([x, torch.ones_like(x)], 1))
    torch.testing.assert_close(got, torch.nn.functional.silu(x), rtol=1e-6, atol=1e-36)
    weights = torch.tensor([[[1e4, -1e4, 0.0, 1e4]]]).repeat(1, 4, 1)
    native.causal_softmax_(weights, 0, None, 1.0)
    for i in range(4):
        row = torch.tensor([1e4, -1e4, 0.0, 1e4])[: i + 1].softmax(-1)
        torch.testing.assert_close(weights[0, i], torch.nn.functional.pad(row, (0, 3 - i)), rtol=1e-6, atol=1e-30)


def test_whole_numbers_are_numbers():
    """ctypes would hand an int over in another register than a float."""
    scores = torch.randn(1, 4, 4)
    found = [scores.clone(), scores.clone()]
    native.causal_softmax_(found[0], 0, None, 2)
    native.causal_softmax_(found[1], 0, None, 2.0)
    grads = [scores.clone(), scores.clone()]
    native.causal_softmax_backward_(found[0], grads[0], 0, None, 2)
    native.causal_softmax_backward_(found[1], grads[1], 0, None, 2.0)
    x, weight = torch.randn(3, 8), torch.ones(8)
    norms = [native.rms_norm(x, weight, eps)[0] for eps in (1, 1.0)]
    for one, other in (found, grads, norms):
        assert torch.equal(one, other)


def test_dropout_without_it_draws_bytes(monkeypatch):
    x = torch.ones(4, 32)
    assert functional._keep_mask(x, 0.5, functional._packs(x))[0].dtype == torch.int16
    monkeypatch.setenv("PHILORA_NATIVE", "0")
    assert functional._keep_mask(x, 0.5, functional._packs(x))[0].dtype == torch.uint8
