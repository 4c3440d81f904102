"""No argument of the compiled functions ends the process: what does not fit is a Python error."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from philora.native import build

pytestmark = pytest.mark.skipif(not build.available(), reason="no compiler")

# In a process of its own, which a fault in C would end.
ATTACK = """
import sys
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from philora.native import build
from philora.native import library as native

class Sub(torch.Tensor):
    pass

sizes = st.sampled_from([0, 1, 2, 3, 4, 7, 16, 31, 32, 64, 300])
kinds = st.sampled_from(["plain", "plain", "plain", "plain", "meta", "neg", "zero", "sub", "strided", "expanded",
                         "fake", "sparse", "freed"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.float64, torch.int64,
                          torch.int16, torch.uint8, torch.bool, torch.complex64])
whole = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 8, 64, 65536, 2**31 - 1, 2**40, 2**62])

@st.composite
def tensors(draw, like=None, dtype=None):
    shape = draw(st.lists(sizes, min_size=1, max_size=3)) if like is None or draw(st.integers(0, 5)) == 0 else like
    dtype = dtype if dtype is not None and draw(st.integers(0, 5)) else draw(dtypes)
    kind = draw(kinds)
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "fake":
        with FakeTensorMode():
            return torch.empty(shape, dtype=dtype)
    if dtype in (torch.int64, torch.int16):
        values = [-(2**63), -1, 0, 1, 2, 31, 2**31 - 1, 2**62] if dtype == torch.int64 else [-1, 0, 7]
        made = torch.tensor(draw(st.lists(st.sampled_from(values), min_size=1, max_size=3)), dtype=dtype)
        made = made.repeat(-(-max(1, torch.Size(shape).numel()) // len(made)))[: torch.Size(shape).numel()].view(shape)
        if draw(st.booleans()):
            made = made.clamp(0, 1)
    else:
        made = torch.zeros(shape).to(dtype)
    if kind == "neg" and dtype in (torch.float32, torch.bfloat16):
        return torch._neg_view(made)
    if kind == "zero" and dtype in (torch.float32, torch.bfloat16):
        return torch._efficientzerotensor(shape, dtype=dtype)
    if kind == "sub" and made.dtype != torch.bool:
        return made.as_subclass(Sub)
    if kind == "strided":
        return torch.stack([made, made], -1)[..., 0]
    if kind == "expanded":
        return made[:1].expand(shape) if made.numel() else made
    if kind == "sparse" and dtype == torch.float32:
        return made.to_sparse()
    if kind == "freed":
        made.untyped_storage().resize_(0)
    return made

f32, i64, i16, u8, bf = torch.float32, torch.int64, torch.int16, torch.uint8, torch.bfloat16

@st.composite
def calls(draw):
    t, c, h, d = (draw(sizes) for _ in range(4))
    k = draw(st.sampled_from([f32, bf]))
    T = lambda shape, dtype=None: draw(tensors(list(shape), dtype or k))
    number = lambda usual: usual if draw(st.integers(0, 4)) else draw(whole)
    angles = None if draw(st.booleans()) else (T((t, d // 2), f32), T((t, d // 2), f32))
    window = draw(st.sampled_from([None, 1, 5, 0, -1, 2**40]))
    documents = T((h,), i64), T((h,), i64)
    name = draw(st.sampled_from(["rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "keep_bits", "keep",
        "add_kept_", "gather_heads", "scatter_heads", "attend", "attend_backward", "causal_softmax_",
        "causal_softmax_backward_", "score_rows_", "from_4bit_"]))
    heads = [T((t, h, d), bf), T((t, draw(sizes), d), bf), T((t, h, d), bf)]
    arguments = {
        "rms_norm": lambda: (T((t, c)), T((c,)), 1e-5),
        "rms_norm_backward": lambda: (T((t, c)), T((c,)), T((t,), f32), T((t, c))),
        "swiglu": lambda: (T((t, c)),),
        "swiglu_backward": lambda: (T((t, 2 * c)), T((t, c))),
        "keep_bits": lambda: (min(number(t), 4096), min(number(c), 4096), number(20000)),
        "keep": lambda: (T((t, c)), T((t, -(-c // 16)), i16)),
        "add_kept_": lambda: (T((t, c)), T((t, c)), T((t, -(-c // 16)), i16)),
        "gather_heads": lambda: (T((t, h, d)), min(number(2), 64), *documents, min(number(t), 4096), angles),
        "scatter_heads": lambda: (T((h * 2 * len(documents[0]), t, d), f32), T((t, h, d)), number(2), *documents,
                                  angles),
        "attend": lambda: (heads, native.Causal(*documents, angles, window, 0.5)),
        "attend_backward": lambda: (heads, native.Causal(*documents, angles, window, 0.5),
                                    (T((t, h, d), bf), T((h, t), f32)), T((t, h, d), bf),
                                    [T((t, h, d), bf) for _ in range(3)]),
        "causal_softmax_": lambda: (T((2, t, c), f32), number(max(0, c - t)), window, 0.5),
        "causal_softmax_backward_": lambda: (T((2, t, c), f32), T((2, t, c), f32), number(0), window, 0.5),
        "score_rows_": lambda: (T((t, c)), None if draw(st.booleans()) else T((c,), f32), T((t,), i64),
                                [T((t,), f32) for _ in range(3)], draw(st.booleans())),
        "from_4bit_": lambda: (T((t, 16 * c), u8), T((16,), f32), T((t,), f32), T((t, 32 * c), bf)),
    }[name]()
    return name, arguments

done = {"returned": 0, "refused": 0}
torch.set_num_threads(2)

@settings(max_examples=int(sys.argv[1]), deadline=None, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))
@seed(int(sys.argv[2]))
@given(calls())
def attack(call):
    name, arguments = call
    try:
        getattr(native, name)(*arguments)
        done["returned"] += 1
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError, OverflowError, NotImplementedError):
        done["refused"] += 1

attack()
print(done["returned"], done["refused"])
"""


def attacked(examples: int, seed: int) -> tuple[int, int]:
    given = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}  # glibc then ends a torn process
    command = [sys.executable, "-c", ATTACK, str(examples), str(seed)]
    run = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"exit code {run.returncode}: {run.stderr[-2000:]}"
    returned, refused = map(int, run.stdout.split())
    return returned, refused


def test_no_argument_ends_the_process():
    returned, refused = attacked(150, 1)
    assert min(returned, refused) > 10, "neither all is refused nor all is taken"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 4))
def test_no_argument_of_many_ends_the_process(seed):
    attacked(3000, seed)
