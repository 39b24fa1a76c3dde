"""cross_entropy by Triton."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from equivalence import require
from triton_checks import (
    DEVICE,
    DTYPES,
    bits,
    check,
    guarded,
    randn,
    short,
    strict,
    tolerance,
    unchanged,
    yardstick,
)

from gptk import Unsupported, functional
from gptk.ops.cross_entropy import triton_impl as cross_entropy
from gptk.ops.triton_launch import ACC

__all__ = ["strict"]


def formula(z, target, ignore_index, smoothing):
    """(loss, its gradient, lse) per row in float64, written out."""
    z, target = z.double().cpu(), target.cpu()
    V = z.shape[1]
    keep = target != ignore_index
    at = torch.where(keep, target, 0)[:, None]
    lse = torch.logsumexp(z, 1)
    loss = lse - (1 - smoothing) * z.gather(1, at)[:, 0] - smoothing / V * z.sum(1)
    grad = torch.exp(z - lse[:, None]) - smoothing / V
    grad.scatter_add_(1, at, torch.full_like(at, -(1 - smoothing), dtype=torch.float64))
    return loss * keep, grad * keep[:, None], lse


def torch_loss(z, target, dloss, ignore_index, smoothing):
    """torch's loss and gradient for logits of the same dtype, the loss in that dtype."""
    z, dloss = yardstick(z.dtype, z.clone(), dloss)
    z.requires_grad_()
    loss = F.cross_entropy(
        z, target, reduction="none", ignore_index=ignore_index, label_smoothing=smoothing
    )
    loss.backward(dloss.to(z.dtype))
    return loss.detach(), z.grad


def compare(z, target, ignore_index=-100, smoothing=0.0, rejects=True):
    before = bits(z, target)
    acc = ACC[z.dtype]
    dloss = randn(z.shape[0], dtype=acc)
    ref, slope, ref_lse = formula(z, target, ignore_index, smoothing)
    loss, lse = cross_entropy.forward(z, target, ignore_index, smoothing)
    base, base_grad = torch_loss(z, target, dloss, ignore_index, smoothing)
    # the loss leaves in the accumulation dtype: float32's error is the yardstick, not bfloat16's
    base_wide, _ = torch_loss(z.to(acc), target, dloss, ignore_index, smoothing)
    check(loss, ref, base_wide, 2, rejects)
    relative = 4 * torch.finfo(acc).eps * ref_lse.abs().max() + torch.finfo(acc).eps
    assert (lse.double().cpu() - ref_lse).abs().max() <= relative
    dz = cross_entropy.backward(dloss, z, target, lse, ignore_index, smoothing)
    want = slope * dloss.double().cpu()[:, None]
    check(dz, want, base_grad, 3, rejects)
    assert not dz[target == ignore_index].any()
    assert unchanged(before, z, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("V", [2, 31, 33, 4097, 9000])
def test_matches_formula(V, dtype, smoothing):
    rows = 40 if V < 4096 else 5
    z = randn(rows, V, dtype=dtype, scale=3.0)
    target = torch.randint(0, V, (rows,), device=DEVICE)
    target[1], target[3] = -100, V - 1
    compare(z, target, smoothing=smoothing)


def test_vocabulary_past_65536():
    z = randn(2, 70001)
    compare(z, torch.tensor([70000, 65536], device=DEVICE))


def test_one_class_has_loss_zero():
    z, target = randn(3, 1), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    assert not loss.any()
    assert not cross_entropy.backward(torch.ones_like(loss), z, target, lse, -100, 0.0).any()


@pytest.mark.parametrize("offset", [0.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_offsets_cost_no_accuracy(offset, smoothing):
    """log-sum-exp near 1e4 has a spacing of 1e-3: neither loss nor gradient may go through it."""
    z = randn(4, 9, scale=1.0)
    z.copy_(torch.round(z * 64) / 64 + offset)
    z[0] = offset  # all equal: the loss is ln 9
    compare(z, torch.tensor([0, 3, 8, 1], device=DEVICE), smoothing=smoothing)


def test_logits_of_both_signs_at_1e4():
    z = guarded(torch.tensor([[1e4, -1e4, 1e4], [-1e4, -1e4, -1e4], [1e4, 0.0, -1e4]]))
    target = torch.tensor([0, 1, 2], device=DEVICE)
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    want = torch.tensor([math.log(2), math.log(3), 2e4], dtype=torch.float64)
    assert (loss.double().cpu() - want).abs().max() <= tolerance(want, want.float(), 2)
    dz = cross_entropy.backward(torch.ones_like(loss), z, target, lse, -100, 0.0).double().cpu()
    third = 1 / 3
    want = torch.tensor(
        [[-0.5, 0, 0.5], [third, -2 * third, third], [1, 0, -1]], dtype=torch.float64
    )
    assert (dz - want).abs().max() <= tolerance(want, want.float(), 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_masked_logits(smoothing):
    """Whole blocks of -inf, the first included, count nothing and make no NaN."""
    z = randn(2, 9000)
    z[:, :5000] = -math.inf
    target = torch.tensor([8000, 5000], device=DEVICE)
    loss, lse = cross_entropy.forward(z, target, -100, smoothing)
    dz = cross_entropy.backward(torch.ones_like(loss), z, target, lse, -100, smoothing)
    if smoothing:
        assert torch.isposinf(loss).all()  # each -inf has a share of the target
        assert torch.equal(dz[:, :5000], torch.full_like(dz[:, :5000], -smoothing / 9000))
        return
    ref, slope, _ = formula(z[:, 5000:], target - 5000, -100, 0.0)
    base, base_grad = torch_loss(z[:, 5000:], target - 5000, torch.ones_like(loss), -100, 0.0)
    check(loss, ref, base, 2)
    check(dz[:, 5000:].contiguous(), slope, base_grad, 3)
    assert not dz[:, :5000].any()
    loss, _ = cross_entropy.forward(z, target * 0, -100, 0.0)
    assert torch.isposinf(loss).all()


def test_upstream_gradient_of_every_row():
    """Liger-Kernel#678: the first row's gradient was applied to all."""
    z = (torch.arange(30) * 37 + 11) % 97 - 48
    z = guarded((z.double() / 16).float().view(6, 5))
    target = torch.tensor([-100, -100, 3, 0, -100, 4], device=DEVICE)
    dloss = torch.tensor([9.0, 9.0, 0.5, 0.25, 9.0, 2.0], device=DEVICE)
    _, slope, _ = formula(z, target, -100, 0.0)
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    dz = cross_entropy.backward(dloss, z, target, lse, -100, 0.0)
    _, base = torch_loss(z, target, dloss, -100, 0.0)
    check(dz, slope * dloss.double().cpu()[:, None], base, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_ignored_rows_are_exactly_zero(dtype):
    z = randn(3, 7, dtype=dtype)
    z[0] = math.nan
    target = torch.tensor([2, 2, 5], device=DEVICE)
    loss, lse = cross_entropy.forward(z, target, 2, 0.1)  # an ignore_index inside [0, V)
    dloss = torch.tensor([math.inf, math.nan, 1.0], device=DEVICE, dtype=loss.dtype)
    dz = cross_entropy.backward(dloss, z, target, lse, 2, 0.1)
    assert not loss[:2].any()
    assert not dz[:2].any()
    assert dz[2].all()


def test_nan_stays_in_its_row():
    z, target = randn(3, 5000), torch.tensor([1, 2, 3], device=DEVICE)
    z[1, 4999] = math.nan
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    dz = cross_entropy.backward(torch.ones_like(loss), z, target, lse, -100, 0.0)
    assert loss.isnan().tolist() == [False, True, False]
    assert dz.isnan().all(1).tolist() == dz.isnan().any(1).tolist() == [False, True, False]


def test_target_outside_the_vocabulary_is_nan_and_not_read():
    z, target = randn(5, 6), torch.tensor([6, -1, 2**40, -(2**40), 3], device=DEVICE)
    bad = [True, True, True, True, False]
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    dz = cross_entropy.backward(torch.ones_like(loss), z, target, lse, -100, 0.0)
    assert loss.isnan().tolist() == bad
    assert dz.isnan().all(1).tolist() == dz.isnan().any(1).tolist() == bad


def test_row_stride_is_free():
    wide, target = randn(4, 50), torch.tensor([0, 5, 9, 3], device=DEVICE)
    compare(wide[::2, 7:17], target[:2])
    compare(wide[1:2, 3:13].expand(4, 10), target)


@pytest.mark.skipif(DEVICE != "cpu", reason="the sparse file is memory of the CPU")
def test_offsets_past_32_bits(tmp_path):
    """Row 2 starts at element 2^31 + 128 of a sparse file; Liger-Kernel#1483."""
    stride = 2**30 + 64
    path, n = tmp_path / "sparse", 2 * stride + 8
    path.touch()
    os.truncate(path, n * 2)
    file = torch.from_file(str(path), shared=True, size=n, dtype=torch.float16)
    z = file.as_strided((3, 8), (stride, 1)).copy_(torch.randn(3, 8))
    near = z.clone()
    target = torch.tensor([1, 7, 3])
    loss, lse = cross_entropy.forward(z, target, -100, 0.0)
    want, want_lse = cross_entropy.forward(near, target, -100, 0.0)
    assert torch.equal(loss, want)
    ones = torch.ones_like(loss)
    dz = cross_entropy.backward(ones, z, target, lse, -100, 0.0)
    assert torch.equal(dz, cross_entropy.backward(ones, near, target, want_lse, -100, 0.0))


def test_launch_config_depends_on_the_vocabulary_alone():
    for V in (1, 31, 32, 50257, 200000):
        config = cross_entropy.launch_config(V)
        assert config == cross_entropy.launch_config(V)
        assert 32 <= config["BLOCK_V"] <= 4096


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize(
    "input, target, weight",
    [
        (torch.zeros(5), torch.tensor(1), None),
        (torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64), None),
        (torch.zeros(2, 5), torch.full((2, 5), 0.2), None),
        (torch.zeros(2, 5), torch.tensor([1, 2]), torch.ones(5)),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_when_named(backend, input, target, weight):
    require(backend)
    with pytest.raises(Unsupported, match="class ids and no class weights"):
        functional.cross_entropy(input, target, weight, backend=backend)
    torch.testing.assert_close(
        functional.cross_entropy(input, target, weight), F.cross_entropy(input, target, weight)
    )
