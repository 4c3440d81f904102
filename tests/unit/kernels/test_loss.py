"""Log-probabilities at labelled positions: values and gradients equal the plain ones, and TRL's outputs."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from trl.trainer.utils import add_fused_lm_head

import philora
from philora.kernels import loss
from philora.kernels.loss import add_label_head, label_scores
from philora.lora.functional import fused
from philora.training.collation import layout_of_batch
from tests import on_device
from tests.references import label_scores_reference

# Every test with the compiled functions, and without them.
pytestmark = pytest.mark.usefixtures("compiled_or_not")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [3, 7, 43])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [False, True])
def test_values_and_gradients(rows, dtype, bias, small, monkeypatch):
    if small:  # several chunks, and several blocks in each
        monkeypatch.setattr(loss, "FEWEST_TOKENS", 5)
        monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
        monkeypatch.setattr(loss, "BLOCK_BYTES", 2 * 4 * 61)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(61, 16, generator=generator).to(dtype)
    offset = torch.randn(61, generator=generator).to(dtype) if bias else None
    labels = torch.randint(0, 61, (rows,), generator=generator)
    pull = torch.randn(rows, generator=generator).to(on_device.chosen())
    weight, labels = weight.to(on_device.chosen()), labels.to(on_device.chosen())
    offset = None if offset is None else offset.to(on_device.chosen())
    # bf16: logits of size 16 are rounded by 2^-9, then softmax and gradient; fp32: the sums run in another order
    close = {"rtol": 5e-2, "atol": 1e-1} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    results, grads = [], []
    for function in (label_scores, label_scores_reference):
        hidden = torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))
        hidden = hidden.to(on_device.chosen(), dtype).requires_grad_()
        exact = function is label_scores_reference and dtype is torch.bfloat16  # the same values, summed in fp32
        inputs = [None if each is None else each.float() if exact else each for each in (hidden, weight, offset)]
        scores = function(*inputs, labels)
        (scores.log_probs * pull).sum().backward()
        results.append(scores)
        grads.append(hidden.grad)
    mine, plain = results
    torch.testing.assert_close(mine.log_probs, plain.log_probs, **close)
    torch.testing.assert_close(mine.entropy, plain.entropy, **close)
    assert (mine.is_top1 == plain.is_top1).float().mean() > 0.97, "only ties may differ"
    torch.testing.assert_close(*grads, **close)
    wrong = label_scores_reference(hidden, weight, offset, (labels + 1) % 61)
    with pytest.raises(AssertionError):  # negative control: labels shifted by one
        torch.testing.assert_close(results[0].log_probs, wrong.log_probs, **close)


def test_gradcheck():
    weight = torch.randn(9, 5, dtype=torch.float64)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 8, 3])
    # the log-probability itself is fp32, so the derivative is compared with the float64 reference, not with differences
    (mine,) = torch.autograd.grad(label_scores(hidden, weight, None, labels).log_probs.sum(), hidden)
    (plain,) = torch.autograd.grad(hidden.matmul(weight.t()).log_softmax(-1)[range(4), labels].sum(), hidden)
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


def outputs(model, ids, labels, **extra):
    out = model(input_ids=ids, labels=labels, fused_lm_head=True, **extra)
    model.zero_grad()
    out.loss.backward()
    return out, [each.grad.clone() for each in model.parameters() if each.grad is not None]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("case", ["some labels", "no label", "head trained", "switched off"])
def test_a_model_gives_what_trl_gives(phi3, case):
    trl, mine = phi3(), phi3()
    for model in (trl, mine):
        model.lm_head.weight.requires_grad_(case == "head trained")
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_label_head(mine)
    ids = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(3)).to(on_device.chosen())
    labels = ids.clone()
    labels[:, : 15 if case == "no label" else 6] = -100
    with fused(case != "switched off"):
        (a, grads_a), (b, grads_b) = outputs(trl, ids, labels), outputs(mine, ids, labels)
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(b, name).float(), getattr(a, name).float(), rtol=1e-5, atol=1e-5)
    for mine_grad, trl_grad in zip(grads_b, grads_a, strict=True):
        torch.testing.assert_close(mine_grad, trl_grad, rtol=1e-4, atol=1e-6)
    assert mine(input_ids=ids).logits.shape == (2, 15, 97)
    assert mine.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape[0] == 2


def test_a_model_that_changes_its_logits_stays_with_trl(phi3):
    model = phi3()
    model.config.logit_scale = 0.5
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.lm_head.weight.requires_grad_(False)
        add_fused_lm_head(each)
    add_label_head(model)
    ids = torch.randint(3, 97, (1, 9), generator=torch.Generator().manual_seed(3))
    assert outputs(model, ids, ids)[0].loss == outputs(plain, ids, ids)[0].loss


@pytest.mark.parametrize("lengths", [[20, 21], [16, 16], [40], [3, 50, 1]])
def test_packed_rows_of_any_length(phi3, lengths):
    """Rows are made even for the products; outputs have the shape of what was given, values and gradients are TRL's."""
    trl, mine = phi3(), philora.optimize(phi3())
    for model in (trl, mine):
        model.lm_head.weight.requires_grad_(False)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_label_head(mine)
    ids = torch.randint(3, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(each) for each in lengths])[None]
    labels = torch.where(torch.arange(sum(lengths))[None] % 3 == 0, -100, ids)
    kept = [each.clone() for each in (ids, positions, labels)]
    (a, grads_a), (b, grads_b) = (outputs(each, ids, labels, position_ids=positions) for each in (trl, mine))
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(getattr(b, name).float(), getattr(a, name).float(), rtol=1e-5, atol=1e-5)
    for mine_grad, trl_grad in zip(grads_b, grads_a, strict=True):
        torch.testing.assert_close(mine_grad, trl_grad, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip(kept, (ids, positions, labels), strict=True))
    seen = []
    mine.model.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    outputs(mine, ids, labels, position_ids=positions)
    assert seen == [-(-sum(lengths) // loss.EVEN_TOKENS) * loss.EVEN_TOKENS]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("fault", [None, "bounds", "labels"])
def test_rows_with_padding_are_laid_without_it(phi3, window, fault):
    """With what the collator counts, rows of several lengths give what TRL's head gives, in the same places."""
    trl, mine = phi3(sliding_window=window), philora.optimize(phi3(sliding_window=window))
    for model in (trl, mine):
        model.lm_head.weight.requires_grad_(False)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_label_head(mine)
    lengths = [7, 12, 3]
    mask = (torch.arange(12)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, 97, mask.shape, generator=torch.Generator().manual_seed(3)) * mask
    labels = ids.masked_fill((mask == 0) | (torch.arange(12)[None] < 2), -100)
    counted = layout_of_batch({"labels": labels, "attention_mask": mask})
    assert counted["document_lengths"] == tuple(lengths)
    if fault == "bounds":
        counted |= {"document_lengths": (8, 11, 3), "token_bounds": torch.tensor([0, 8, 19, 22], dtype=torch.int32)}
    if fault == "labels":
        counted["label_rows"] = counted["label_rows"] - 1
    seen = []
    mine.model.layers[0].register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    a, grads_a = outputs(trl, ids, labels, attention_mask=mask)
    b, grads_b = outputs(mine, ids, labels, attention_mask=mask, **counted)
    assert seen == [(1, 32)], "22 tokens, and 10 that make the row even"
    names = ("loss", "log_probs", "entropy", "is_top1", "label_mask")
    same = all(
        torch.allclose(getattr(b, name).float(), getattr(a, name).float(), rtol=1e-4, atol=1e-5) for name in names
    )
    same &= all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(grads_b, grads_a, strict=True))
    assert same == (fault is None)


def test_rows_with_padding_on_the_left_stay_as_they_are():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert "document_lengths" not in layout_of_batch({"labels": torch.ones(2, 3), "attention_mask": mask})


class Elsewhere(torch.Tensor):
    """A tensor of another device, as a machine without one can have it: it does not mix with tensors of the CPU.

    It calls itself a meta tensor, for which autograd needs no device, and computes on the CPU.
    """

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device="meta"
        )

    def __init__(self, inside):
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        on_cpu = [each for each in leaves if isinstance(each, torch.Tensor) and not isinstance(each, cls) and each.ndim]
        copies = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if on_cpu and not copies and any(isinstance(each, cls) for each in leaves):
            raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
        device = kwargs.get("device")
        stays = device is None or torch.device(device).type == "meta"
        if device is not None:
            kwargs["device"] = "cpu"
        strip = lambda each: each.inside if isinstance(each, cls) else each  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(strip, (args, kwargs))
        result = function(*args, **kwargs)
        if function is torch.ops.aten.copy_.default or not stays:
            return result
        return torch.utils._pytree.tree_map(lambda each: cls(each) if isinstance(each, torch.Tensor) else each, result)


@pytest.mark.parametrize("labels_are", ["with the head", "with the last norm"])
def test_a_head_on_another_device_than_the_last_norm(labels_are, phi3):
    trl, mine = phi3(), phi3()
    for model in (trl, mine):
        model.lm_head.weight.requires_grad_(False)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    add_label_head(mine)
    last_norm = mine.model.norm
    mine.model.norm.forward = lambda x: Elsewhere(type(last_norm).forward(last_norm, x))
    ids = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(3))
    labels = torch.where(torch.arange(15)[None] % 3 == 0, -100, ids)
    given = Elsewhere(labels) if labels_are == "with the last norm" else labels
    expected = trl(input_ids=ids, labels=labels, fused_lm_head=True)
    output = mine(input_ids=ids, labels=given, fused_lm_head=True)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_head_that_accelerate_keeps_elsewhere_until_it_runs(place, tied, phi3, tmp_path):
    trl, mine = (philora.optimize(phi3(tie_word_embeddings=tied)) for _ in range(2))
    for model in (trl, mine):
        model.requires_grad_(False)
    where = {"": "cpu", "lm_head": place, **({"model.embed_tokens": place} if tied else {})}
    parts = {"model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"}
    device_map = {name: where.get(name, "cpu") for name in sorted(parts)}
    dispatch_model(mine, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    if place == "cpu":
        cpu_offload(mine.lm_head, execution_device=torch.device("cpu"))
    assert mine.lm_head.weight.is_meta
    for model in (trl, mine):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        add_label_head(model)
    ids = torch.randint(3, 97, (2, 15), generator=torch.Generator().manual_seed(3))
    a, b = (model(input_ids=ids, labels=ids, fused_lm_head=True) for model in (trl, mine))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert mine.lm_head.weight.is_meta, "it is put away again"
