"""The C++ attention kernels alone: shapes, layouts, masks, dropout, threads, instruction sets.

The yardstick is the formula in float64 on the same inputs. A result may be 2 times (gradients: 3
times) as far from it as PyTorch's own attention in the same dtype, plus that dtype's own rounding.
In float64 itself the distance of the float32 results is scaled by the ratio of the two epsilons and
counted once more: the formula rounds too.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptk import native
from gptk.random import keep_mask

if reason := native.available():
    pytest.skip(reason, allow_module_level=True)

from gptk.ops.attention import cpp_impl

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ("out", "lse", "dq", "dk", "dv")
SEED = 0x1234_5678_9ABC_DEF0


def visible(Tq: int, Tk: int, causal: bool, window: int | None) -> Tensor:
    i, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)[None, :]
    seen = (j <= i) if causal else torch.ones(Tq, Tk, dtype=torch.bool)
    return seen & (j > i - window) if window else seen


def inputs(B=1, H=1, Hkv=None, Tq=1, Tk=1, D=8, Dv=None, dtype=torch.float32, seed=0):
    """q, k, v, dout."""
    g = torch.Generator().manual_seed(seed)
    Hkv, Dv = Hkv or H, Dv or D
    shapes = [(B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), (B, H, Tq, Dv)]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def formula(q, k, v, dout, *, causal=False, scale=None, p=0.0, seed=SEED, window=None):
    """(out, lse, dq, dk, dv) by the definition, in the dtype of the arguments."""
    (B, H, Tq, D), (Hkv, Tk) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(D) if scale is None else scale
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    seen = visible(Tq, Tk, causal, window)
    scores = (q @ keys.mT * scale).masked_fill(~seen, -math.inf)
    some = seen.any(1, keepdim=True)
    weights = scores.masked_fill(~some, 0).softmax(-1).masked_fill(~seen, 0)
    if p:
        kept = keep_mask(seed, B * H * Tq, Tk, p).view(B, H, Tq, Tk)
        weights = weights * kept / (1 - p) if p < 1 else weights * 0
    out = weights @ values
    return out.detach(), scores.detach().logsumexp(-1), *torch.autograd.grad(out, (q, k, v), dout)


def torch_own(q, k, v, dout, *, causal=False, scale=None, p=0.0, seed=SEED, window=None):
    """PyTorch's attention in the same dtype; by its parts where the mask must be ours."""
    if p:
        return formula(q, k, v, dout, causal=causal, scale=scale, p=p, seed=seed, window=window)
    H, Hkv = q.shape[1], k.shape[1]
    seen = visible(q.shape[2], k.shape[2], causal, window)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    keys, values = (x.repeat_interleave(H // Hkv, 1) for x in (k, v))
    mask = seen | ~seen.any(1, keepdim=True)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    out = out * seen.any(1, keepdim=True)
    lse = formula(q, k, v, dout, causal=causal, scale=scale, window=window)[1]
    return out.detach(), lse, *torch.autograd.grad(out, (q, k, v), dout)


def kernel(q, k, v, dout, *, causal=False, scale=None, p=0.0, seed=SEED, window=None):
    """(out, lse, dq, dk, dv) by the C++ kernels."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    out, lse = cpp_impl.forward(q, k, v, causal, scale, p, seed, window)
    needs = (True, True, True)
    grads = cpp_impl.backward(dout, q, k, v, out, lse, causal, scale, p, seed, window, needs)
    return out, lse, *grads


def within(name: str, dtype: torch.dtype, got: Tensor, own: Tensor, ref: Tensor) -> bool:
    """Whether got is as near to ref as the rule of this file asks; infinities must agree.

    own: PyTorch's result in dtype (float32 for float64).
    """
    finite = ref.isfinite()
    if not torch.equal(got.double()[~finite], ref[~finite]):
        return False
    got, own, ref = (x.double()[finite] for x in (got, own, ref))
    if ref.numel() == 0:
        return True
    ratio = 2.0**-29 if dtype == torch.float64 else 1.0
    factor = (3 if name.startswith("d") else 2) + (dtype == torch.float64)
    bound = factor * (own - ref).abs().max() + noise(name, dtype, ref)
    return bool((got - ref).abs().max() <= ratio * bound)


def noise(name: str, dtype: torch.dtype, ref: Tensor) -> Tensor:
    """The rounding of dtype at the size of ref (float32 for float64 and for lse)."""
    low = torch.float32 if name == "lse" or dtype == torch.float64 else dtype
    return 2 * ((ref.to(low) + 0.3 - 0.3).double() - ref).abs().max()


def check(tensors, **options) -> None:
    dtype = tensors[0].dtype
    ref = formula(*(x.double() for x in tensors), **options)
    own = torch_own(*(x.float() if dtype == torch.float64 else x for x in tensors), **options)
    got = kernel(*tensors, **options)
    for name, g, o, r in zip(NAMES, got, own, ref, strict=True):
        assert g.shape == r.shape
        assert g.dtype == (native.ACC[dtype] if name == "lse" else dtype)
        error = (g.double() - r).abs().nan_to_num(0).max()
        assert within(name, dtype, g, o, r), f"{name}: max error {error:.3g}"


LENGTHS = [(1, 1), (7, 7), (17, 33), (33, 17), (65, 65), (127, 130), (130, 127), (1, 130), (130, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("Tq, Tk", LENGTHS)
def test_matches_formula_at_any_length(Tq, Tk, causal, dtype):
    check(inputs(B=2, H=3, Tq=Tq, Tk=Tk, D=16, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "D, Dv",
    [(1, 1), (3, 5), (8, 8), (9, 17), (32, 33), (40, 40), (64, 8), (128, 128), (256, 255)],
)
def test_matches_formula_at_any_head_size(D, Dv, dtype):
    check(inputs(H=2, Tq=37, Tk=70, D=D, Dv=Dv, dtype=dtype), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("Tq, Tk", [(200, 200), (70, 300), (90, 40)])
@pytest.mark.parametrize("window", [1, 2, 10, 64, 1000])
def test_matches_formula_with_sliding_window(window, Tq, Tk, dtype):
    check(inputs(H=2, Tq=Tq, Tk=Tk, D=8, dtype=dtype), causal=True, window=window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Hkv", [1, 2, 3])
def test_matches_formula_with_grouped_queries(Hkv, dtype):
    check(inputs(B=2, H=6, Hkv=Hkv, Tq=40, Tk=50, D=16, dtype=dtype), causal=True, p=0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Tq, Tk, window", [(33, 33, None), (65, 130, 40), (140, 5, None)])
def test_matches_formula_with_dropout(Tq, Tk, window, dtype):
    check(inputs(B=2, H=2, Tq=Tq, Tk=Tk, D=24, dtype=dtype), causal=True, p=0.3, window=window)


@pytest.mark.parametrize("heads", [1, 40], ids=["keys split over items", "one item a head"])
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.5])
def test_matches_formula_over_many_blocks(heads, scale):
    check(inputs(H=heads, Tq=300, Tk=520, D=4), causal=True, scale=scale)


def test_rejects_wrong_answers():
    tensors = inputs(H=2, Tq=33, Tk=33)
    ref = formula(*(x.double() for x in tensors), causal=True)
    own = torch_own(*tensors, causal=True)
    for name, o, r in zip(NAMES, own, ref, strict=True):
        missing = r.clone()
        missing[:, :, -1] = 0
        for wrong in (r * 0, -r, 2 * r, r.flip(2), r.flip(1), missing):
            assert not within(name, torch.float32, wrong, o, r)
        assert within(name, torch.float32, r, o, r)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_any_strides_give_the_same_bits(p):
    B, H, T, D = 2, 3, 70, 8
    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(B, T, 3 * H * D, generator=g)
    q, k, v = (x.view(B, T, H, D).transpose(1, 2) for x in qkv.split(H * D, 2))
    for dout in (
        torch.randn(B, T, H, D, generator=g).transpose(1, 2),
        torch.ones(1, 1, 1, D).expand(B, H, T, D),
        torch.randn(B, H, T, 3 * D, generator=g)[..., D : 2 * D],
    ):
        strided = kernel(q, k, v, dout, causal=True, p=p)
        plain = kernel(*(x.contiguous() for x in (q, k, v, dout)), causal=True, p=p)
        for name, a, b in zip(NAMES, strided, plain, strict=True):
            assert torch.equal(a, b), name
    assert strided[0].transpose(1, 2).is_contiguous()


def test_strides_beyond_32_bits(tmp_path):
    stride = 2**30 + 64
    shape, strides = (3, 1, 5, 8), (stride, 40, 8, 1)
    file = torch.from_file(
        str(tmp_path / "sparse"), shared=True, size=2 * stride + 40, dtype=torch.bfloat16
    )
    far = file.as_strided(shape, strides)
    near = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    far.copy_(near)
    for name, a, b in zip(NAMES, kernel(*[far] * 4), kernel(*[near] * 4), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Tq, Tk", [(33, 33), (70, 9), (1, 130)])
def test_writes_every_element_and_none_outside(Tq, Tk, dtype, monkeypatch):
    """Outputs and scratch start as NaN, between guards; a read of either shows in the results."""
    tensors = inputs(H=2, Tq=Tq, Tk=Tk, D=5, Dv=9, dtype=dtype)
    plain = kernel(*tensors, causal=True, p=0.1)
    empty, made = torch.empty, []

    def guarded(*shape, dtype, device=None):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        n = math.prod(shape)
        made.append((empty(n + 128, dtype=dtype).fill_(math.nan), n))
        made[-1][0][:64] = made[-1][0][64 + n :] = 7
        return made[-1][0][64 : 64 + n].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(
        torch,
        "empty_strided",
        lambda size, stride, dtype, device: guarded(*size, dtype=dtype).as_strided(
            size, stride, made[-1][0].storage_offset() + 64
        ),
    )
    got = kernel(*tensors, causal=True, p=0.1)
    monkeypatch.undo()
    assert len(made) == 7
    for memory, n in made:
        assert (memory[:64] == 7).all()
        assert (memory[64 + n :] == 7).all()
    for name, a, b in zip(NAMES, got, plain, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_a_bad_value_reaches_no_row_that_cannot_see_it(window, dtype, bad):
    """PyTorch multiplies the hidden NaN by a weight of 0 and spoils every row."""
    T, at = 150, 75
    q, k, v, dout = inputs(H=2, Tq=T, Tk=T, dtype=dtype)
    clean = kernel(q, k, v, dout, causal=True, window=window)
    sees = visible(T, T, True, window)[:, at]
    for which in (k, v):
        spoiled = which.clone()
        spoiled[:, :, at] = bad
        pair = (spoiled, v) if which is k else (k, spoiled)
        out, lse, dq, _, _ = kernel(q, *pair, dout, causal=True, window=window)
        for a, b in ((out, clean[0]), (lse, clean[1]), (dq, clean[2])):
            assert torch.equal(a[:, :, ~sees], b[:, :, ~sees])
        assert not out[:, :, at].isfinite().all()
    seen_by = visible(T, T, True, window)[at]
    for which in (0, 3):  # a bad query row or upstream gradient, seen from the keys
        tensors = [q, k, v, dout]
        tensors[which] = tensors[which].clone()
        tensors[which][:, :, at] = bad
        _, _, _, dk, dv = kernel(*tensors, causal=True, window=window)
        assert torch.equal(dk[:, :, ~seen_by], clean[3][:, :, ~seen_by])
        assert torch.equal(dv[:, :, ~seen_by], clean[4][:, :, ~seen_by])
        assert dk[:, :, seen_by].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_keys_are_zero(dtype):
    Tq, Tk = 140, 9
    tensors = inputs(H=2, Tq=Tq, Tk=Tk, dtype=dtype)
    out, lse, dq, dk, dv = kernel(*tensors, causal=True)
    none = Tq - Tk
    assert (out[:, :, :none] == 0).all()
    assert (lse[:, :, :none] == -math.inf).all()
    assert (dq[:, :, :none] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    check(tensors, causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores_are_exact(sign, dtype):
    """No finite stand-in for -inf: -62720 is a score like any other."""
    q = torch.full((1, 1, 3, 16), 245.0 * sign, dtype=dtype)
    k = torch.full((1, 1, 3, 16), 16.0, dtype=dtype)
    v = torch.arange(3.0, dtype=dtype)[None, None, :, None].expand(1, 1, 3, 16)
    out, lse = cpp_impl.forward(q, k, v, True, 1.0, 0.0, 0, None)
    assert torch.equal(out[0, 0, :, 0], torch.tensor([0, 0.5, 1], dtype=dtype))
    assert lse[0, 0, 0] == sign * 62720
    q, k = torch.tensor([[-20000.0]]), torch.tensor([[1.0], [0.0]])
    out, _ = cpp_impl.forward(
        q[None, None], k[None, None, :1], torch.ones(1, 1, 1, 1), True, 1.0, 0.0, 0, None
    )
    assert out.item() == 1


def test_dropout_draws_one_mask_for_both_passes():
    """With v = identity the output is the dropped weight matrix itself."""
    T, p = 130, 0.25
    q, k, v, dout = inputs(B=2, H=2, Tq=T, Tk=T, D=4)
    eye = torch.eye(T).expand(2, 2, T, T)
    weights = kernel(q, k, eye, eye, causal=True, p=p)[0]
    out, _, _, _, dv = kernel(q, k, v, dout, causal=True, p=p)
    kept = keep_mask(SEED, 2 * 2 * T, T, p).view(2, 2, T, T)
    undropped = kernel(q, k, eye, eye, causal=True)[0]
    assert torch.equal(weights != 0, kept & visible(T, T, True, None))
    args = dict(rtol=8 * torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(weights[kept], undropped[kept] / (1 - p), **args)
    for got, a, b in ((out, weights, v), (dv, weights.mT, dout)):
        exact = a.double() @ b.double()
        own = (a @ b - exact).abs().max()
        assert (got - exact).abs().max() <= 3 * own + noise("out", torch.float32, exact)
    other = kernel(q, k, eye, eye, causal=True, p=p, seed=SEED + 1)[0]
    assert not torch.equal(weights, other)


def test_dropout_extremes():
    tensors = inputs(H=2, Tq=40, Tk=40)
    plain = kernel(*tensors, causal=True, p=0.0, seed=1)
    tiny = kernel(*tensors, causal=True, p=1e-12, seed=2)
    for name, a, b in zip(NAMES, plain, tiny, strict=True):
        assert torch.equal(a, b), name
    out, lse, *grads = kernel(*tensors, causal=True, p=1.0)
    assert torch.equal(lse, plain[1])
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, torch.tensor(-1)])
def test_seed_is_taken_modulo_2_to_the_64(seed):
    tensors = inputs(H=2, Tq=40, Tk=40)
    expected = kernel(*tensors, p=0.5, seed=2**64 - 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(kernel(*tensors, p=0.5, seed=seed), expected, strict=False)
    )


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_every_subset_of_gradients(needs):
    q, k, v, dout = inputs(H=4, Hkv=2, Tq=40, Tk=50)
    out, lse, *every = kernel(q, k, v, dout, causal=True, scale=0.3)
    some = cpp_impl.backward(dout, q, k, v, out, lse, True, 0.3, 0.0, SEED, None, needs)
    for needed, got, expected in zip(needs, some, every, strict=True):
        assert torch.equal(got, expected) if needed else got is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, H, Hkv", [(1, 2, 1), (12, 4, 4)])
def test_thread_count_changes_no_bit(B, H, Hkv, dtype):
    tensors = inputs(B=B, H=H, Hkv=Hkv, Tq=300, Tk=310, D=16, dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(kernel(*tensors, causal=True, p=0.1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, a, b in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(a, b), name


def test_inputs_are_not_written():
    tensors = inputs(H=2, Tq=40, Tk=40)
    copies = [x.clone() for x in tensors]
    kernel(*tensors, causal=True, p=0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_minus_infinity_alone_are_not_a_row_without_keys(dtype):
    q, k, v, _ = inputs(H=1, Tq=3, Tk=3, dtype=dtype)
    q, k = q.abs() + 1, k.abs() + 1
    k[:, :, 0] = -math.inf
    out, lse = cpp_impl.forward(q, k, v, True, 1.0, 0.0, 0, None)
    assert out[:, :, 0].isnan().all()  # as softmax has it
    assert out[:, :, 1:].isfinite().all()
    assert (lse[:, :, 0] == -math.inf).all()


@pytest.mark.parametrize("level", native.isa_levels())
def test_every_instruction_set(level):
    """This file's numerical tests once more, in a process confined to the level."""
    if os.environ.get("GPTK_ISA"):
        assert native.isa() == os.environ["GPTK_ISA"]
        return
    names = "head_size or window or grouped or dropout or blocks or bad_value or writes or large"
    chosen = f"({names} or test_every_instruction_set) and not strides"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", __file__, "-k", chosen],
        env=os.environ | {"GPTK_ISA": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
