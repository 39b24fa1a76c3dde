"""The Triton kernels of layer_norm in the interpreter: values, gradients, masks, edges."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from interpreter_checks import (
    assert_close,
    guarded,
    guarded_outputs,
    keep_rule,
    needs_interpreter,
    normal,
    overflow_checks,
)

from gptk.ops.layer_norm import triton_backward, triton_impl

pytestmark = needs_interpreter
SEED = 2**40 + 12345
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def _overflows_are_errors():
    with overflow_checks():
        yield


@pytest.fixture
def narrow_blocks(monkeypatch):
    """Blocks of 32 columns, so that a short row is walked in several steps as a long one is."""
    for module in (triton_impl, triton_backward):
        monkeypatch.setattr(module, "launch_config", lambda *_: (1, 32, 4))


def definition(x, weight, bias, residual, p, dy, dh, dtype):
    """y, h and the four gradients of torch's own layer norm, computed in `dtype`."""
    leaves = [
        None if t is None else t.to(dtype or t.dtype).clone().requires_grad_()
        for t in (x, residual, weight, bias)
    ]
    x, residual, weight, bias = leaves
    h = x
    if p:
        keep = keep_rule(SEED, *x.shape, p)
        h = torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)
    if residual is not None:
        h = h + residual
    # torch wants one dtype of weights and rows: the sum is formed in float32 where they differ
    mixed = weight is not None and weight.dtype != h.dtype
    rows = h.to(weight.dtype) if mixed else h
    y = torch.nn.functional.layer_norm(rows, x.shape[-1:], weight, bias).to(h.dtype)
    total = (y * dy.to(y.dtype)).sum() + (0.0 if dh is None else (h * dh.to(h.dtype)).sum())
    present = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(total, present))
    return y.detach(), h.detach(), [None if t is None else next(found) for t in leaves]


def check(M, N, x_dtype, r_dtype, w_dtype, p=0.0, has_dh=True):
    g = torch.Generator().manual_seed(M * 1000 + N)
    x = normal(g, M, N, dtype=x_dtype)
    residual = None if r_dtype is None else normal(g, M, N, dtype=r_dtype)
    weight = None if w_dtype is None else normal(g, N, dtype=w_dtype)
    bias = None if w_dtype is None else normal(g, N, dtype=w_dtype)
    h_dtype = x_dtype if r_dtype is None else torch.promote_types(x_dtype, r_dtype)
    dy = normal(g, M, N, dtype=h_dtype)
    dh = normal(g, M, N, dtype=h_dtype) if has_dh and residual is not None else None
    inputs = [t for t in (x, residual, weight, bias, dy, dh) if t is not None]
    before = [t.clone() for t in inputs]

    with guarded_outputs():
        y, h, mean, rstd = triton_impl.forward(x, weight, bias, 1e-5, residual, p, SEED)
        saved = x if h is None else h
        needs = (True, residual is not None, True, True)
        grads = triton_impl.backward(
            dy, dh, saved, weight, mean, rstd, x_dtype, r_dtype, p, SEED, needs
        )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert y.dtype == h_dtype
    assert mean.dtype == rstd.dtype == (F64 if h_dtype == F64 else F32)

    arguments = (x, weight, bias, residual, p, dy, dh)
    exact = definition(*arguments, F64)
    ours = definition(*arguments, F32 if h_dtype == F64 else None)
    assert_close("y", y, ours[0], exact[0], 2)
    if residual is not None:
        assert_close("h", h, ours[1], exact[1], 2)
    names = ("dx", "dresidual", "dweight", "dbias")
    for name, got, own, want in zip(names, grads, ours[2], exact[2], strict=True):
        if want is not None:
            assert got.dtype == (F64 if h_dtype == F64 else own.dtype), name
            assert_close(name, got, own, want, 3)
    if w_dtype is None:  # the sums exist without a weight too, in the dtype of h
        xhat = torch.nn.functional.layer_norm(exact[1], (N,))
        assert grads[2].dtype == grads[3].dtype == h_dtype
        assert_close("dweight", grads[2], grads[2], (dy.double() * xhat).sum(0), 1)
        assert_close("dbias", grads[3], grads[3], dy.double().sum(0), 1)


@pytest.mark.parametrize(
    "M, N", [(1, 1), (3, 5), (7, 63), (5, 100), (2, 1023), (37, 17), (300, 20)]
)
@pytest.mark.parametrize("r_dtype", [None, F32])
def test_equals_the_definition(M, N, r_dtype):
    check(M, N, F32, r_dtype, F32)


@pytest.mark.parametrize(
    "x_dtype, r_dtype, w_dtype",
    [
        (BF16, None, BF16),
        (BF16, None, F32),
        (BF16, F32, F32),
        (F32, BF16, F32),
        (BF16, BF16, BF16),
        (F16, F16, F32),
        (F64, F64, F64),
        (F32, F32, None),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_dtype_with_and_without_dropout(x_dtype, r_dtype, w_dtype, p):
    if p and r_dtype is None:
        return check(6, 50, x_dtype, None, w_dtype)
    check(6, 50, x_dtype, r_dtype, w_dtype, p)


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("M, N", [(3, 33), (17, 64)])
@pytest.mark.parametrize(
    "x_dtype, r_dtype, p", [(F32, None, 0.0), (F32, F32, 0.25), (BF16, F32, 0.25), (F64, F64, 0.5)]
)
def test_rows_wider_than_a_block(M, N, x_dtype, r_dtype, p):
    check(M, N, x_dtype, r_dtype, F64 if x_dtype == F64 else F32, p)


def test_a_row_wider_than_every_block():
    check(1, 70_001, F32, F32, F32)


def test_without_the_gradient_of_the_second_output():
    check(4, 40, F32, F32, F32, has_dh=False)


def forward_and_backward(x, needs=(True, True, True, True), p=0.2):
    g = torch.Generator().manual_seed(0)
    residual, weight, bias = normal(g, *x.shape), normal(g, x.shape[1]), normal(g, x.shape[1])
    y, h, mean, rstd = triton_impl.forward(x, weight, bias, 1e-5, residual, p, SEED)
    dy, dh = normal(g, *x.shape), normal(g, *x.shape)
    grads = triton_impl.backward(dy, dh, h, weight, mean, rstd, F32, F32, p, SEED, needs)
    return (y, h), grads


@pytest.mark.parametrize("blocks", ["one", "narrow"])
def test_every_subset_of_gradients_is_what_all_of_them_are(blocks, request):
    if blocks == "narrow":
        request.getfixturevalue("narrow_blocks")
    x = normal(torch.Generator().manual_seed(1), 3, 40)
    _, complete = forward_and_backward(x)
    for needs in itertools.product((False, True), repeat=4):
        _, some = forward_and_backward(x, needs)
        for need, got, want in zip(needs, some, complete, strict=True):
            assert torch.equal(got, want) if need else got is None


def test_same_bits_twice_and_for_a_tensor_seed():
    x = normal(torch.Generator().manual_seed(2), 9, 50)
    first, second = forward_and_backward(x), forward_and_backward(x)
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)
    residual = torch.zeros(9, 50)
    by_int = triton_impl.forward(x, None, None, 1e-5, residual, 0.4, SEED)[1]
    by_tensor = triton_impl.forward(x, None, None, 1e-5, residual, 0.4, torch.tensor(SEED))[1]
    assert torch.equal(by_int, by_tensor)
    assert torch.equal(by_int != 0, keep_rule(SEED, 9, 50, 0.4))


def test_dropping_everything_leaves_the_residual():
    residual = normal(torch.Generator().manual_seed(3), 3, 20)
    x = torch.full((3, 20), float("nan"))
    h = triton_impl.forward(x, None, None, 1e-5, residual, 1.0, SEED)[1]
    assert torch.equal(h, residual)


@pytest.mark.parametrize("value", [0.0, 0.1, 1234.0, -1e15])
@pytest.mark.parametrize("N", [2, 3, 100, 257])
def test_a_constant_row_gives_exactly_the_bias(value, N):
    bias = normal(torch.Generator().manual_seed(4), N)
    y, _, mean, _ = triton_impl.forward(
        torch.full((2, N), value), torch.ones(N), bias, 1e-5, None, 0.0, 0
    )
    assert torch.equal(y, bias.expand(2, N))
    assert torch.equal(mean, torch.full((2,), value))


@pytest.mark.parametrize("offset", [40000.0, 80000.0, 1e6])
def test_a_large_offset_keeps_its_digits(offset):
    x = offset + torch.arange(256.0).remainder(4).repeat(3, 1)
    y = triton_impl.forward(x, None, None, 1e-5, None, 0.0, 0)[0]
    exact = torch.nn.functional.layer_norm(x.double(), (256,))
    std = x.double().std(correction=0)
    assert (y.double() - exact).abs().max() <= 4 * 2.0**-24 * offset / std + 2e-6


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_stays_in_its_row():
    x = normal(torch.Generator().manual_seed(5), 6, 33)
    (clean_y, _), clean = forward_and_backward(x, p=0.0)
    x[2, 7] = float("nan")
    (y, _), grads = forward_and_backward(x, p=0.0)
    others = [0, 1, 3, 4, 5]
    for got, want in ((y, clean_y), (grads[0], clean[0]), (grads[1], clean[1])):
        assert bool(got[2].isnan().all())
        assert torch.equal(got[others], want[others])
    assert bool(grads[2].isnan().all())
    assert torch.equal(grads[3], clean[3])


def test_unit_gradients_count_the_rows():
    for M in (1, 3, 37, 257):
        x = normal(torch.Generator().manual_seed(M), M, 20)
        _, _, mean, rstd = triton_impl.forward(x, None, None, 1e-5, None, 0.0, 0)
        ones = guarded(torch.ones(M, 20))
        needs = (False, False, False, True)
        dbias = triton_impl.backward(ones, None, x, None, mean, rstd, F32, None, 0.0, 0, needs)[3]
        assert torch.equal(dbias, torch.full((20,), float(M)))


def test_a_block_holds_the_row_or_divides_it():
    for itemsize, widest in ((4, 8192), (8, 4096)):
        for module in (triton_impl, triton_backward):
            for N in (1, 16, 17, 768, 1600, 4096, 8192, 8193, 65536, 10**6):
                block_m, block_n, warps = module.launch_config(N, itemsize)
                assert block_n >= N or N > widest
                assert block_m * block_n <= max(1024, widest)
                wide = triton_backward.launch_config(N, itemsize, crowded=True)
                assert wide[1] >= N or N > widest // 2
                assert block_n & (block_n - 1) == block_m & (block_m - 1) == 0
                assert warps in (4, 8, 16)


@pytest.mark.parametrize(
    "has_dropout, dh_itemsize, arch, crowded",
    [(True, 0, 80, True), (False, 4, 90, False), (False, 4, 100, True), (False, 2, 100, False)],
)
def test_a_mask_and_on_blackwell_a_float32_dh_leave_less_room(
    has_dropout, dh_itemsize, arch, crowded
):
    assert triton_backward.is_crowded(has_dropout, dh_itemsize, arch) == crowded
