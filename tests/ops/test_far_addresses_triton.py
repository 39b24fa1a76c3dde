"""Every Triton kernel at elements, rows and strides past 2^31, in memory that is only reserved.

The last programs of each launch run; what they leave is, bit for bit, what a small tensor with the
same values gives.
"""

import signal

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from far_memory import in_a_child, programs, reserved  # noqa: E402
from interpreter_checks import needs_interpreter  # noqa: E402

from gptk.ops import triton_launch  # noqa: E402
from gptk.ops.adamw import triton_impl as adamw  # noqa: E402
from gptk.ops.adamw import triton_norm, triton_tables  # noqa: E402
from gptk.ops.attention import triton_backward as attention_backward  # noqa: E402
from gptk.ops.attention import triton_decode, triton_dkdv, triton_dq  # noqa: E402
from gptk.ops.attention import triton_impl as attention  # noqa: E402
from gptk.ops.attention.ranges import ranges  # noqa: E402
from gptk.ops.cross_entropy import triton_impl as cross_entropy  # noqa: E402
from gptk.ops.gelu import triton_impl as gelu  # noqa: E402
from gptk.ops.layer_norm import triton_backward as layer_norm_backward  # noqa: E402
from gptk.ops.layer_norm import triton_impl as layer_norm  # noqa: E402
from gptk.ops.linear import triton_impl as linear  # noqa: E402
from gptk.random import philox4x32, random_words  # noqa: E402

pytestmark = needs_interpreter
SEED, P = 2**45 + 77, 0.25
ALL = (True, True, True)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def last(t, end):
    """The last end[0], end[1] ... of the axes of t."""
    return t[tuple(slice(size - n, None) for size, n in zip(t.shape, end, strict=True))]


def ending(large, values):
    """(large, values), after these were written to the end of each axis of large."""
    last(large, values.shape).copy_(values)
    return large, values


def equal(large, small):
    assert bool(small.count_nonzero())
    assert torch.equal(last(large, small.shape), small)


def kept(rows, columns):
    """The keep mask of the last 64 of `rows` rows, by gptk.random's definition."""
    row = torch.arange(rows - 64, rows)[:, None]
    return random_words(SEED, row, columns) >= round(P * 2**32)


@in_a_child
def test_gelu():
    n = 512 + 100  # a block that is full and one that is not
    x, x_end = ending(reserved(2**31 + n), randn(n))
    dy, dy_end = ending(reserved(2**31 + n), randn(n, seed=1))
    with programs(gelu, _gelu_forward_kernel=(-2, -1), _gelu_backward_kernel=(-2, -1)):
        y, dx = gelu.forward(x, "none"), gelu.backward(dy, x, "tanh")
    equal(y, gelu.forward(x_end, "none"))
    equal(dx, gelu.backward(dy_end, x_end, "tanh"))


@in_a_child
def test_the_epilogue_of_linear_and_its_sums_over_rows():
    M, N, end = 2**17 + 5, 2**20 + 8, (5, 136)  # partial sums: 2049 rows of N
    dy, dy_end = ending(reserved(M, N), randn(*end))
    pre, pre_end = ending(reserved(M, N), randn(*end, seed=1))
    options = ("gelu", torch.float32, True)
    some = dict(_activation_backward_kernel=(-2, -1), _sum_partials_kernel=(-2, -1))
    with programs(linear, **some):
        got = linear.activation_backward(dy, pre, *options)
    for large, small in zip(
        got, linear.activation_backward(dy_end, pre_end, *options), strict=True
    ):
        equal(large, small)


@in_a_child
def test_layer_norm_with_rows_past_2_to_the_32():
    M, N, end = 2**32 + 5, 64, (5, 64)
    x, x_end = ending(reserved(M, N), randn(*end))
    residual, residual_end = ending(reserved(M, N), randn(*end, seed=1))
    dy, dy_end = ending(reserved(M, N), randn(*end, seed=2))
    dh, dh_end = ending(reserved(M, N), randn(*end, seed=3))
    weight, bias = randn(N, seed=4), randn(N, seed=5)
    keep, scale = kept(M, N)[-5:], 1 / (1 - P)
    assert keep.any()
    assert not keep.all()
    with programs(layer_norm, _layer_norm_forward_kernel=(-1,)):
        y, h, mean, rstd = layer_norm.forward(x, weight, bias, 1e-5, residual, P, SEED)
    h_end = torch.where(keep, x_end * scale, 0.0) + residual_end
    equal(h, h_end)
    small = layer_norm.forward(h_end, weight, bias, 1e-5, None, 0.0, 0)
    for a, b in zip((y, mean, rstd), (small[0], *small[2:]), strict=True):
        equal(a, b)

    layer_norm_backward.GROUPS = 2**62  # a tile of rows for each program
    some = dict(_layer_norm_backward_kernel=(-1,), _layer_norm_reduce_kernel=())
    floats = (torch.float32, torch.float32)
    with programs(layer_norm_backward, **some) as seen:
        dx, dresidual, *_ = layer_norm_backward.backward(
            dy, dh, h, weight, mean, rstd, *floats, P, SEED, (True,) * 4
        )
    _, d, *sums = layer_norm_backward.backward(
        dy_end, dh_end, h_end, weight, *small[2:], *floats, 0.0, 0, (True,) * 4
    )
    equal(dresidual, d)
    equal(dx, torch.where(keep, d * scale, 0.0))
    for partial, total in zip(seen["_layer_norm_backward_kernel"][2:4], sums, strict=True):
        equal(partial, total[None])


@in_a_child
def test_layer_norm_with_rows_wider_than_a_block():
    M, N = 2**18 + 5, 2**13 + 3
    x, x_end = ending(reserved(M, N), randn(1, N))
    residual, residual_end = ending(reserved(M, N), randn(1, N, seed=1))
    with programs(layer_norm, _layer_norm_forward_kernel=(-1,)):
        got = layer_norm.forward(x, None, None, 1e-5, residual, 0.0, 0)
    small = layer_norm.forward(x_end, None, None, 1e-5, residual_end, 0.0, 0)
    for a, b in zip(got, small, strict=True):
        equal(a, b)
    options = (torch.float32, None, 0.0, 0, (True, False, False, False))
    with programs(layer_norm_backward, _layer_norm_backward_kernel=((M - 1) % 65536,)):
        dx = layer_norm_backward.backward(x, None, got[1], None, *got[2:], *options)[0]
    equal(dx, layer_norm_backward.backward(x_end, None, small[1], None, *small[2:], *options)[0])


@in_a_child
def test_the_weight_gradients_of_layer_norm_over_wide_rows():
    M, N, end = 2048, 2**23 + 520, (8, 520)  # group 255 has the last 8 rows
    dy, dy_end = ending(reserved(M, N), randn(*end))
    h, h_end = ending(reserved(M, N), randn(*end, seed=1))
    mean, mean_end = ending(reserved(M), randn(8, seed=2))
    rstd, rstd_end = ending(reserved(M), randn(8, seed=3))
    options = (torch.float32, None, 0.0, 0, (False, False, True, True))
    some = dict(_layer_norm_columns_kernel=(-2, -1), _layer_norm_reduce_kernel=(-2, -1))
    with programs(layer_norm_backward, **some):
        got = layer_norm_backward.backward(dy, None, h, None, mean, rstd, *options)[2:]
    wide = [ending(torch.zeros(8, 8192 + 520), t)[0] for t in (dy_end, h_end)]
    small = layer_norm_backward.backward(wide[0], None, wide[1], None, mean_end, rstd_end, *options)
    for a, b in zip(got, small[2:], strict=True):
        equal(a, b[-520:])


@in_a_child
def test_cross_entropy():
    N, V = 2**15 + 2, 2**16 + 3
    logits, row = ending(reserved(N, V, strides=(V + 5, 1)), randn(1, V))
    target, dloss = torch.full((N,), V - 1), torch.ones(N)
    options = (-100, 0.1, 30.0, 1e-2)
    with programs(cross_entropy, _cross_entropy_forward_kernel=(-1,)):
        loss, lse = cross_entropy.forward(logits, target, *options)
    small = cross_entropy.forward(row, target[-1:], *options)
    equal(loss, small[0])
    equal(lse, small[1])
    with programs(cross_entropy, _cross_entropy_backward_kernel=(-1,)):
        dlogits = cross_entropy.backward(dloss, logits, target, lse, *options)
    equal(dlogits, cross_entropy.backward(dloss[-1:], row, target[-1:], small[1], *options))


def updated(tensors, **rounding):
    """(parameter, gradient, exp_avg, exp_avg_sq), after an update of them."""
    options = ([1e-2], [0.1], 0.9, 0.999, 1e-8, 1.0, None)
    adamw.update(*([t] for t in tensors), [None], [torch.ones(())], *options, **rounding)
    return tensors


@in_a_child
def test_adamw_and_the_norm_of_its_gradients():
    n = triton_tables.BLOCK + 5  # a block that is full and one that is not
    pairs = [ending(reserved(2**31 + n), randn(n, seed=seed).abs()) for seed in range(4)]
    large, small = zip(*((a, b.clone()) for a, b in pairs), strict=True)
    with programs(adamw, _prepare_kernel=(0,), _update_kernel=(-2, -1)):
        updated(large)
    for a, b in zip(large, updated(small), strict=True):
        equal(a, b)
    with programs(triton_norm, _norm_partial_kernel=(-2, -1), _norm_kernel=(0,)):
        norm = triton_norm.norm([large[1]])
    assert norm == triton_norm.norm([small[1]]) > 0.0


@in_a_child
def test_adamw_draws_the_random_bits_of_an_element_past_2_to_the_31():
    n, bf16 = triton_tables.BLOCK + 5, torch.bfloat16
    param, *others = (reserved(2**31 + n, dtype=bf16) for _ in range(4))
    last(param, (n,)).fill_(1.0)
    with programs(adamw, _prepare_kernel=(0,), _update_kernel=(-2, -1)):
        updated((param, *others), rounding=(SEED, [3]))
    # no gradient: 1 - lr wd, in float32
    bits = torch.tensor([1.0 - 1e-2 * 0.1], dtype=torch.float32).view(torch.int32).long()
    i = torch.arange(2**31, 2**31 + n)
    words = philox4x32((SEED & 0xFFFFFFFF, SEED >> 32), (i >> 2, 3, 0, 2))
    random = torch.stack(words, 1).gather(1, (i & 3)[:, None])[:, 0] & 0xFFFF
    got = last(param, (n,)).view(torch.int16).long() & 0xFFFF
    assert torch.equal(got, bits + random >> 16)
    assert len(got.unique()) == 2


def heads(layout, count, T, D):
    """Reserved (B, H, T, D) of `count` heads: beside each other, or `layout` of them a batch."""
    if layout == "heads":
        return reserved(1, T, count, D).transpose(1, 2)
    return reserved(count // layout, layout, T, D)


@pytest.fixture
def small_tiles(monkeypatch):
    for module in (attention, triton_dq, triton_dkdv):
        monkeypatch.setattr(module, "launch_config", lambda *_: (16, 16, 4, 1))


FORWARD = dict(_attention_forward_kernel=range(-4, 0))
BACKWARD = dict(
    attention_delta_kernel=range(-4, 0),
    attention_dq_kernel=range(-4, 0),
    attention_dkdv_kernel=range(-2, 0),
)
PAIRS = 2**27 + 1  # of heads that share a key head: with 20 rows each, past 2^32 rows


def queries_and_keys(beside, Tq, Tk, D):
    """(large, small) of q, k, v and dout: of the small ones there are 2 heads and 1 key head."""
    made = []
    for seed, (count, T) in enumerate([(2, Tq), (1, Tk), (1, Tk), (2, Tq)]):
        large = heads("heads" if beside else count, count * PAIRS, T, D)
        made.append(ending(large, randn(1, count, T, D, seed=seed)))
    return zip(*made, strict=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "beside, packed",
    [(True, False), (False, False), (True, True)],
    ids=["heads", "batches", "packed"],
)
@in_a_child
def test_attention(beside, packed):
    (q, k, v, dout), (q_end, k_end, v_end, dout_end) = queries_and_keys(beside, 20, 24, 16)
    cu_q, cu_k = torch.tensor([0, 7, 20]), torch.tensor([0, 11, 24])
    seen = ranges((cu_q, cu_k), 20, 24, True, None) if packed else None
    options = (True, 0.25, 0.0, 0, None)
    with programs(attention, **FORWARD):
        out, lse = attention.forward(q, k, v, *options, seen)
    small = attention.forward(q_end, k_end, v_end, *options, seen)
    equal(out, small[0])
    equal(lse, small[1])
    into = tuple(torch.empty_like(t) for t in (q, k, v))
    with programs(attention_backward, **BACKWARD):
        attention_backward.backward(dout, q, k, v, out, lse, *options, ALL, into, seen)
    grads = attention_backward.backward(
        dout_end, q_end, k_end, v_end, *small, *options, ALL, None, seen
    )
    for a, b in zip(into, grads, strict=True):
        equal(a, b)


@pytest.mark.usefixtures("small_tiles")
@in_a_child
def test_attention_drops_by_rows_past_2_to_the_32():
    """With q, k and v the identity, an element of out, dq and dk stands for one probability."""
    T = 24
    tensors = [heads(2, 2 * PAIRS, T, T), *(heads(1, PAIRS, T, T) for _ in range(2))]
    for t in tensors:
        last(t, (1, t.shape[1], T, T)).copy_(torch.eye(T).expand(1, t.shape[1], T, T))
    dout = torch.ones(T).expand(PAIRS, 2, T, T)
    options = (False, 1.0, P, SEED, None)
    keep = kept(2 * PAIRS * T, T)[-2 * T :].view(1, 2, T, T)
    with programs(attention, **FORWARD):
        out, lse = attention.forward(*tensors, *options)
    assert torch.equal(last(out, (1, 2, T, T)) != 0, keep)
    none = heads(2, 2 * PAIRS, T, T)  # an output of 0 makes delta 0: ds is 0 where dropped
    with programs(attention_backward, **BACKWARD):
        dq, dk, _ = attention_backward.backward(dout, *tensors, none, lse, *options, ALL)
    assert torch.equal(last(dq, (1, 2, T, T)) != 0, keep)
    # a key head's gradient sums its two heads'
    assert torch.equal(last(dk, (1, 1, T, T))[0, 0].T != 0, keep.any(1)[0])


@in_a_child
def test_attention_with_its_keys_split():
    """Its workspaces are small whatever the tensors are: only these have far elements."""
    triton_decode.LEAST_KEYS = 16
    q = reserved(2, 4, 3, 16, strides=(2**34, 2**32, 2**30, 1)).copy_(randn(2, 4, 3, 16))
    k, v = (
        reserved(2, 2, 40, 16, strides=(2**34, 2**33, 2**27, 1)).copy_(randn(2, 2, 40, 16, seed=i))
        for i in (1, 2)
    )
    options = (True, 0.25, 0.0, 0, None)
    some = dict(_attention_part_kernel=range(8), _attention_join_kernel=range(24))
    with programs(triton_decode, **some):  # all of them
        got = attention.forward(q, k, v, *options)
    small = attention.forward(*(t.contiguous() for t in (q, k, v)), *options)
    for a, b in zip(got, small, strict=True):
        equal(a, b)


@triton.jit
def _row_kernel(y_ptr, x_ptr, stride, WIDE: tl.constexpr, CUT: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    at = row * stride
    if CUT:
        at = at.to(tl.int32)  # which no check for overflow sees
    tl.store(y_ptr, tl.load(x_ptr + at))


def third_row(**options):
    x, y = reserved(3, 4, strides=(2**30, 1)), torch.zeros(1)
    x[2] = 1.0
    with programs(triton_launch, _row_kernel=(-1,)):
        triton_launch.launch(_row_kernel, (3,), x.device, y, x, x.stride(0), **options)
    return y.item()


@in_a_child
def test_a_right_kernel_reads_a_row_past_2_to_the_31():
    assert third_row(WIDE=True, CUT=False) == 1.0


def test_an_overflow_of_32_bits_fails():
    with pytest.raises(AssertionError, match="int32 overflow"):
        in_a_child(third_row)(WIDE=False, CUT=False)


def test_an_address_outside_fails_and_says_so():
    with pytest.raises(AssertionError, match=f"signal {signal.SIGSEGV.value}"):
        in_a_child(third_row)(WIDE=True, CUT=True)
