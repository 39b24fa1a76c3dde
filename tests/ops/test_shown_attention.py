"""Failures of other projects' attention and addressing: right here, on every backend."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import SHARED
from equivalence import missing

import gptk.functional as GF


@pytest.fixture(params=["torch", "cpp", "triton"])
def backend(request):
    reason = missing("attention", request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def near(value, right, tol):
    value, right = torch.as_tensor(value).detach().double(), torch.as_tensor(right).double()
    assert value.shape == right.shape
    assert not value.isnan().any()
    assert (value - right).abs().max().item() <= tol


def gradients(q, k, v, do, backend, **options):
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = GF.attention(q, k, v, backend=backend, **options)
    out.backward(do)
    return out, q.grad, k.grad, v.grad


def test_A1_any_strides_of_inputs_and_gradients(shown, backend):
    case = shown.A1()
    i, right = case["inputs"], case["expect"]
    qkv = i["qkv"].float()
    q, k, v = (u.reshape(1, 7, 2, 8).transpose(1, 2) for u in qkv.split(16, -1))
    do = i["do"].float().transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(1, 2, 7, 16)
    wide[..., ::2] = i["inner_stride2"].float()
    inner = wide[..., ::2]
    one = torch.ones(()).expand(1, 2, 7, 8)
    for name, tensors, up in (
        ("packed", (q, k, v), do),
        ("inner", (inner, inner, inner), do),
        ("expanded", (q, k, v), one),
    ):
        found = gradients(*tensors, up, backend, causal=True)
        for value, exact in zip(found, right[name], strict=True):
            near(value, exact, case["tol"])


def test_A3_masks_and_large_scores(shown, backend):
    case = shown.A3()
    i, right = case["inputs"], case["expect"]
    w = {n: t.float() for n, t in i["window"].items() if n != "keep"}
    found = GF.attention(w["q"], w["k"], w["v"], causal=True, window=10, backend=backend)
    near(found, right["window"], case["tol"])
    for name in ("single", "causal"):
        q, k, v = (i[name][n].float() for n in "qkv")
        out = GF.attention(q, k, v, causal=name == "causal", scale=1.0, backend=backend)
        exact = torch.tensor(right[name]).reshape(1, 1, -1, 1).expand_as(out)
        near(out, exact, case["tol"])
    q, k, v = (i["low"][n].float()[None, None] for n in "qkv")  # row 0 sees key 0 alone
    out = GF.attention(q, k, v, causal=True, scale=1.0, backend=backend)
    near(out[0, 0, 0, 0], torch.tensor(right["low_row0"]), case["tol"])


@pytest.mark.parametrize("where", ["key", "value"])
def test_a_nan_of_the_future_reaches_no_earlier_row(backend, where):
    q, k, v = (
        torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    )
    clean = GF.attention(q, k, v, causal=True, backend=backend)
    (k if where == "key" else v)[:, :, 6] = torch.nan
    out = GF.attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(out[:, :, :6], clean[:, :, :6])
    assert out[:, :, 6:].isnan().all()


def test_A4_one_query_sees_the_whole_cache(shown, backend):
    case = shown.A4()
    q, k, v = (case["inputs"][n].float() for n in "qkv")
    out = GF.attention(q, k, v, causal=True, backend=backend)
    near(out, torch.full_like(out, case["expect"]), case["tol"])


def test_A7_odd_lengths_of_ones(shown, backend):
    case = shown.A7()
    for key, right in case["expect"].items():
        if isinstance(key, tuple):
            tq, tk = key
            q, k = torch.ones(1, 1, tq, 8), torch.ones(1, 1, tk, 8)
            found = gradients(q, k, k.clone(), torch.ones(1, 1, tq, 8), backend)
        else:
            x = case["inputs"]["x"].float()
            found = gradients(x, x.clone(), x.clone(), torch.ones(1, 1, 1, 16), backend)
        for name, value in zip(("out", "dq", "dk", "dv"), found, strict=True):
            exact = torch.as_tensor(right[name]).double().expand(value.shape)
            near(value, exact, 4 * case["tol"])


@pytest.mark.parametrize("D", [1, 3, 17, 64, 129, 256])
def test_every_head_size(backend, D):
    """Errors pooled over four draws of (2, 2, 9, D), against those of torch's fused attention."""
    ours, torchs, noise = [0.0] * 4, [0.0] * 4, [0.0] * 4
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(2, 2, 9, D, generator=generator) for _ in range(4)]
        exact = gradients(*(t.double() for t in tensors), "torch", causal=True)
        q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        own = (y.detach(), *torch.autograd.grad(y, (q, k, v), tensors[3]))
        found = gradients(*tensors, backend, causal=True)
        for n, (f, o, e) in enumerate(zip(found, own, exact, strict=True)):
            ours[n] = max(ours[n], (f.double() - e).abs().max().item())
            torchs[n] = max(torchs[n], (o.double() - e).abs().max().item())
            rounded = e.float()
            noise[n] = max(noise[n], 2 * ((rounded + 0.3) - 0.3 - rounded).abs().max().item())
    for n, factor in enumerate((2, 3, 3, 3)):
        assert ours[n] <= factor * torchs[n] + noise[n]


def test_A9_backward_uses_the_mask_of_forward(shown, backend):
    case = shown.A9()
    i, P = case["inputs"], case["expect"]["P"]
    q, k, p = i["q"].float(), i["k"].float(), i["p"]
    options = dict(causal=True, dropout_p=p, seed=1234)
    A = GF.attention(q, k, torch.eye(8)[None, None], backend=backend, **options)
    kept = A != 0
    assert 0 < kept.sum() < (P != 0).sum()
    near(A[kept], P[kept] / (1 - p), case["tol"])
    v, do = torch.randn(1, 1, 8, 5), torch.randn(1, 1, 8, 5)
    out, _, _, dv = gradients(q, k, v, do, backend, **options)
    near(out, A.double() @ v.double(), case["tol"])
    near(dv, A.double().mT @ do.double(), case["tol"])
    other = GF.attention(
        q, k, torch.eye(8)[None, None], backend=backend, causal=True, dropout_p=p, seed=1235
    )
    assert not torch.equal(other != 0, kept)
    torch.manual_seed(0)
    unseeded = [GF.attention(q, k, v, causal=True, dropout_p=p, backend=backend) for _ in range(2)]
    assert not torch.equal(*unseeded)
    plain = GF.attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(GF.attention(q, k, v, causal=True, dropout_p=0.0, backend=backend), plain)


def test_A10_bf16_is_right_whatever_the_interpreter_does(shown, backend):
    case = shown.A10()
    i, right = case["inputs"], case["expect"]
    product = GF.linear(i["a"], i["b"].mT.contiguous(), backend=backend)
    assert torch.equal(product.double(), right["ab"].double())
    fine = i["fp32_to_bf16"][:4]  # a + b is the number that a fused add has to round
    a = fine.bfloat16()
    b = (fine - a.float()).bfloat16()
    _, h = GF.layer_norm(a[:, None], (1,), residual=b[:, None], backend=backend)
    assert torch.equal(h[:, 0], (a.float() + b.float()).bfloat16())
    assert torch.equal(h[:, 0].double(), right["stored"][:4])
    v = torch.tensor([2.5, 2.0]).bfloat16().reshape(1, 1, 2, 1)
    zero = torch.zeros(1, 1, 2, 1).bfloat16()
    mean = GF.attention(zero, zero, v, backend=backend)
    assert torch.equal(mean, torch.full_like(v, right["add"] / 2))


FAR = """
    import sys, tempfile
    sys.path.insert(0, {cases!r})
    import torch
    from interpreter_facts import far_rows
    import gptk.functional as GF

    backend = {backend!r}
    with tempfile.NamedTemporaryFile() as f:
        x = far_rows(f.name)  # (3, 8) float16, rows 2**30 + 64 elements apart
        near = x.clone().contiguous()
        assert x.stride(0) > 2**30
        target = torch.tensor([1, 2, 3])
        calls = [
            lambda t: GF.layer_norm(t, (8,), backend=backend),
            lambda t: GF.cross_entropy(t, target, reduction="none", backend=backend),
            lambda t: GF.attention(*[t[:, None, None]] * 3, backend=backend),
            lambda t: GF.attention(*[t[None, None]] * 3, causal=True, backend=backend),
            lambda t: GF.attention(*[t[None, :, None]] * 3, backend=backend),
            lambda t: GF.gelu(t, backend=backend),
        ]
        for call in calls:
            assert torch.equal(call(x), call(near))
    print("far rows are right")
"""


def test_N9_rows_more_than_2_31_elements_apart(shown, backend):
    assert shown.N9()["expect"][0] == 2**31
    code = textwrap.dedent(FAR).format(cases=str(SHARED / "cases"), backend=backend)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert "far rows are right" in done.stdout, done.stderr
