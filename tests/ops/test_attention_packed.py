"""Packed documents of attention: each is attended as if it were alone, by every backend."""

import math
from itertools import accumulate

import pytest
import torch
from equivalence import require
from interpreter_checks import assert_close

import gptk.functional as GF
from gptk.ops.attention.ranges import clamped, offsets, ranges
from gptk.ops.attention.reference import keep
from gptk.random import keep_mask

F32, F64 = torch.float32, torch.float64
OPTIONS = [{}, {"causal": True}, {"causal": True, "window": 4}]
SAME = [(7, 0, 16, 1, 11), (32, 1, 31), (0, 0, 5, 0)]
DIFFERENT = [
    ((3, 0, 9, 6, 2), (19, 5, 9, 2, 0)),
    ((0, 40, 1), (3, 17, 70)),
    ((1, 1, 1), (33, 2, 150)),
]


@pytest.fixture(params=["torch", "triton", "cpp"])
def backend(request):
    return require(request.param, "attention")


@pytest.fixture
def _small_tiles(monkeypatch):
    pytest.importorskip("triton")
    from test_attention_triton import use_tiles

    use_tiles(monkeypatch, 16, 16)


def cu(lengths, dtype=torch.int32):
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def drawn(q_lengths, k_lengths, H=2, Hkv=1, D=8, Dv=6, seed=0):
    """query, key, value and the upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    Tq, Tk = sum(q_lengths), sum(k_lengths)
    shapes = [(1, H, Tq, D), (1, Hkv, Tk, D), (1, Hkv, Tk, Dv), (1, H, Tq, Dv)]
    return [torch.randn(shape, generator=g) for shape in shapes]


def packed(tensors, q_lengths, k_lengths, backend, **options):
    """out and its gradients, in one call."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    out = GF.attention(
        *leaves, enable_gqa=True, backend=backend,
        cu_seqlens_q=cu(q_lengths), cu_seqlens_k=cu(k_lengths, torch.int64), **options,
    )  # fmt: skip
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))


def looped(tensors, q_lengths, k_lengths, backend, **options):
    """The same, document by document."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    parts = [t.split(n, 2) for t, n in zip(leaves, (q_lengths, k_lengths, k_lengths), strict=True)]
    outs = [
        GF.attention(*part, enable_gqa=True, backend=backend, **options)
        for part in zip(*parts, strict=True)
    ]
    out = torch.cat(outs, 2)
    return out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(out.dtype))


def check(q_lengths, k_lengths, backend, dtype=F32, **options):
    tensors = [t.to(dtype) for t in drawn(q_lengths, k_lengths)]
    got = packed(tensors, q_lengths, k_lengths, backend, **options)
    lengths = (q_lengths, k_lengths)
    exact = looped([t.to(F64) for t in tensors], *lengths, "torch", **options)
    own = looped([t.to(F32) if dtype == F64 else t for t in tensors], *lengths, "torch", **options)
    q, k, v, dout = (t.double() for t in tensors)
    eps, scale = torch.finfo(F64 if dtype == F64 else F32).eps, q.shape[-1] ** -0.5
    # saving lse, and not p, costs the rounding of lse: a relative error of p
    lost = eps * (1 + scale * (q @ k.mT).abs().max() + math.log(k.shape[2]))
    # dp - delta is 0 for a query with one key: of two equal sums their rounding remains
    terms = dout.abs().max() * v.abs().max() * v.shape[-1] * scale * eps
    terms *= max(q.abs().max(), k.abs().max())
    names, factors, extra = ("out", "dq", "dk", "dv"), (2, 3, 3, 3), (0.0, terms, terms, 0.0)
    for name, factor, more, a, b, c in zip(names, factors, extra, got, own, exact, strict=True):
        assert a.dtype == dtype
        floor = more + lost * c.abs().max() if name != "out" else 0.0
        assert_close(name, a, b, c, factor, floor)
    blind = torch.cat(
        [
            ~keep(
                n, m, options.get("causal", False), options.get("window"), torch.device("cpu")
            ).any(1)
            for n, m in zip(q_lengths, k_lengths, strict=True)
        ]
    )
    assert (got[0][:, :, blind] == 0).all()
    assert (got[1][:, :, blind] == 0).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", SAME, ids=str)
@pytest.mark.usefixtures("_small_tiles")
def test_documents_are_attended_as_if_each_were_alone(lengths, options, backend):
    check(lengths, lengths, backend, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", DIFFERENT, ids=str)
@pytest.mark.usefixtures("_small_tiles")
def test_queries_and_keys_of_different_lengths(lengths, options, backend):
    check(*lengths, backend, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
@pytest.mark.usefixtures("_small_tiles")
def test_every_dtype(dtype, backend):
    check((20, 0, 3, 19), (20, 4, 30, 6), backend, dtype, causal=True)


@pytest.mark.parametrize("first", [15, 16, 17])
@pytest.mark.parametrize("second", [1, 15, 16, 17])
@pytest.mark.usefixtures("_small_tiles")
def test_lengths_around_the_edges_of_tiles(first, second, backend):
    check((first, second, 3), (second, first, 17), backend, causal=True)
    check((first, second, 3), (16, second, first), backend)


def test_the_shipped_tiles_and_many_blocks(backend):
    check((130, 1, 70, 0, 60), (140, 200, 1, 3, 60), backend, causal=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about inf - inf
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("which", range(4), ids=["query", "key", "value", "dout"])
@pytest.mark.usefixtures("_small_tiles")
def test_a_nan_stays_in_its_document(which, options, backend):
    q_lengths, k_lengths = (20, 9, 14, 5), (9, 20, 14, 16)
    tensors = drawn(q_lengths, k_lengths)
    clean = packed(tensors, q_lengths, k_lengths, backend, **options)
    sides = (q_lengths, k_lengths, k_lengths, q_lengths)
    start = sum(sides[which][:2])
    tensors[which][:, :, start + 13, 2] = math.nan
    spoiled = packed(tensors, q_lengths, k_lengths, backend, **options)
    if backend == "torch":  # autograd's products meet 0 * NaN: the definition is its forward
        clean, spoiled = clean[:1], spoiled[:1]
    for a, b, lengths in zip(
        spoiled, clean, (q_lengths, q_lengths, k_lengths, k_lengths), strict=False
    ):
        own = slice(sum(lengths[:2]), sum(lengths[:3]))
        outside = torch.ones(a.shape[2], dtype=torch.bool)
        outside[own] = False
        assert torch.equal(a[:, :, outside], b[:, :, outside])
    assert (which == 3 and backend == "torch") or any(a.isnan().any() for a in spoiled)


def test_dropout_counts_packed_rows_and_columns(backend):
    lengths, p, seed = (9, 0, 12), 0.25, 2**40 + 7
    T = sum(lengths)
    q, k, _, _ = drawn(lengths, lengths, H=2, Hkv=2)
    eye = torch.eye(T).expand(1, 2, T, T)
    options = dict(causal=True, dropout_p=p, seed=seed, cu_seqlens_q=cu(lengths), backend=backend)
    weights = GF.attention(q, k, eye, **options)[0]
    seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    assert torch.equal(weights != 0, keep_mask(seed, 2 * T, T, p).view(2, T, T) & seen)


@pytest.mark.usefixtures("_small_tiles")
def test_a_tile_visits_the_keys_of_its_documents_only(monkeypatch):
    require("triton", "attention")
    from triton.runtime import interpreter

    if torch.cuda.is_available():
        pytest.skip("counts products in Triton's interpreter")
    builder, products = interpreter.interpreter_builder, []
    create_dot = builder.create_dot
    monkeypatch.setattr(
        builder, "create_dot", lambda *a: products.append(1) or create_dot(*a), raising=True
    )
    # 16 queries each; the second has no queries, its 160 keys lie within the first tile's range
    q_lengths, k_lengths = (10, 0, 6, 32), (16, 160, 16, 32)
    q, k, v, _ = drawn(q_lengths, k_lengths, H=1)
    GF.attention(q, k, v, backend="triton", cu_seqlens_q=cu(q_lengths), cu_seqlens_k=cu(k_lengths))
    assert len(products) == 2 * (2 + 2 * 2)


def brute(q_lengths, k_lengths, causal, window):
    blocks = [
        keep(n, m, causal, window, torch.device("cpu"))
        for n, m in zip(q_lengths, k_lengths, strict=True)
    ]
    return torch.block_diag(*(b.to(torch.int64) for b in blocks)).bool()


@pytest.mark.parametrize("options", [(False, None), (True, None), (True, 1), (True, 3)], ids=str)
def test_the_ranges_and_the_definition_are_the_same_rule(options):
    g = torch.Generator().manual_seed(1)
    for _ in range(50):
        q_lengths, k_lengths = (torch.randint(0, 7, (5,), generator=g).tolist() for _ in range(2))
        Tq, Tk = sum(q_lengths), sum(k_lengths)
        documents = cu(q_lengths, torch.int64), cu(k_lengths, torch.int64)
        found = ranges(documents, Tq, Tk, *options)
        assert all(t.dtype == torch.int32 and t.is_contiguous() for t in found)
        i, j = torch.arange(Tq)[:, None], torch.arange(Tk)[None, :]
        by_query = (j >= found.key_low[:, None]) & (j < found.key_high[:, None])
        by_key = (i >= found.query_low) & (i < found.query_high)
        right = brute(q_lengths, k_lengths, *options)
        assert torch.equal(by_query, right)
        assert torch.equal(by_key, right)
        assert torch.equal(keep(Tq, Tk, *options, torch.device("cpu"), documents), right)
        for low, high, T in ((*found[:2], Tk), (*found[2:], Tq)):
            assert (low <= high).all()
            assert all((t.diff() >= 0).all() and ((t >= 0) & (t <= T)).all() for t in (low, high))


def test_offsets_that_are_not_looked_at_are_clamped():
    valid = torch.tensor([0, 0, 3, 9], dtype=torch.int32)
    assert torch.equal(clamped(valid, 9), valid.long())
    for wrong in ([5, 2, 100, 7], [-(2**40), 2**40, -3, 2**62], [9, 9, 0, 0]):
        made = clamped(torch.tensor(wrong), 9)
        assert made[0] == 0
        assert made[-1] == 9
        assert (made.diff() >= 0).all()


def call(Tq, Tk, B=1, **options):
    return GF.attention(torch.ones(B, 1, Tq, 8), *[torch.ones(B, 1, Tk, 8)] * 2, **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(Tq=4, Tk=4, B=2, cu_seqlens_q=cu((4,))), "batch axis of 1"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=[0, 4]), "cu_seqlens_q is a list, it must be a tensor"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((4,)), cu_seqlens_k=3), "cu_seqlens_k is a int"),
        (dict(Tq=4, Tk=4, causal=True, window=2.5), "window=2.5 must be a whole number of keys"),
        (dict(Tq=4, Tk=4, causal=True, window=True), "window=True must be a whole number of keys"),
        (dict(Tq=4, Tk=5, cu_seqlens_q=cu((4,))), "give cu_seqlens_k"),
        (dict(Tq=4, Tk=4, cu_seqlens_k=cu((4,))), "needs cu_seqlens_q"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((3,))), r"rise from 0 to 4, it is \[0, 3\]"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=torch.tensor([1, 4])), r"rise from 0 to 4, it is \[1, 4\]"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=torch.tensor([0, 3, 2, 4])), "rise from 0 to 4"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((4,)).float()), "int32 or int64"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((4,))[None]), "one dimension"),
        (dict(Tq=0, Tk=0, cu_seqlens_q=cu(())), "at least 2 entries"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((4,)).to("meta")), "is on meta, query on cpu"),
        (dict(Tq=4, Tk=4, cu_seqlens_q=cu((4,)), cu_seqlens_k=cu((2, 2))), "they must fit"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_offsets_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_no_tokens_at_all(backend):
    assert call(0, 0, cu_seqlens_q=cu((0, 0)), backend=backend).shape == (1, 1, 0, 8)
    out = call(3, 0, cu_seqlens_q=cu((1, 2)), cu_seqlens_k=cu((0, 0)), backend=backend)
    assert torch.equal(out, torch.zeros(1, 1, 3, 8))


def test_offsets_of_any_stride_and_no_write_to_them(backend):
    strided = torch.tensor([0, 9, 3, 9, 7, 9])[::2]
    before = strided.clone()
    q, k, v, _ = drawn((3, 4), (3, 4))
    options = dict(causal=True, enable_gqa=True, backend=backend)
    out = GF.attention(q, k, v, cu_seqlens_q=strided, **options)
    assert torch.equal(out, GF.attention(q, k, v, cu_seqlens_q=cu((3, 4)), **options))
    assert torch.equal(strided, before)
    assert offsets(q, k, None, None) is None
