"""A few queries over many keys in Triton's interpreter: the parts of the keys make the whole."""

import math

import pytest
import torch

pytest.importorskip("triton")

from interpreter_checks import needs_interpreter, normal, overflow_checks
from test_attention_triton import BF16, F16, F32, F64, SEED, check, visible

from gptk.ops.attention import triton_decode, triton_dkdv, triton_dq, triton_impl

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _overflows_are_errors():
    with overflow_checks():
        yield


@pytest.fixture(autouse=True)
def split_calls(monkeypatch):
    """Parts of 16 keys at least, in tiles of 16; the list of calls that were split."""
    monkeypatch.setattr(triton_decode, "LEAST_KEYS", 16)
    monkeypatch.setattr(triton_decode, "launch_config", lambda *_: (16, 16, 4, 1))
    for module in (triton_impl, triton_dq, triton_dkdv):
        monkeypatch.setattr(module, "launch_config", lambda *_: (16, 16, 4, 1))
    calls, forward = [], triton_decode.forward

    def counted(*arguments):
        calls.append(arguments)
        return forward(*arguments)

    monkeypatch.setattr(triton_decode, "forward", counted)
    return calls


@pytest.mark.parametrize("Tk", [17, 32, 33, 100, 257])
@pytest.mark.parametrize("Tq", [1, 2, 7, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_parts_make_the_whole(Tq, Tk, causal, split_calls):
    check(1, 2, 2, Tq, Tk, 8, 8, causal=causal)
    assert split_calls


@pytest.mark.parametrize("Tk", [1, 2, 15, 16])
def test_one_part_of_a_few_keys(Tk, monkeypatch, split_calls):
    monkeypatch.setattr(triton_decode, "pays", lambda *_: True)
    check(1, 2, 2, 1, Tk, 8, 8)
    check(1, 2, 1, 16, Tk, 8, 8)  # most queries see no key
    check(1, 2, 1, 3, Tk, 8, 8, causal=False)
    assert len(split_calls) == 3


@pytest.mark.parametrize("H, Hkv", [(2, 2), (3, 1), (6, 2), (8, 1)])
@pytest.mark.parametrize("Tq", [1, 5])
def test_groups_share_their_keys(H, Hkv, Tq, split_calls):
    check(2, H, Hkv, Tq, 40, 8, 16, p=0.2)
    assert split_calls


@pytest.mark.parametrize("Tq, Tk, window", [(1, 90, 40), (5, 90, 40), (16, 90, 17), (3, 60, 2**31)])
def test_a_window_is_what_is_split(Tq, Tk, window, split_calls):
    check(1, 2, 1, Tq, Tk, 8, 8, window=window)
    assert split_calls


def test_rows_without_keys_among_rows_with_some(monkeypatch, split_calls):
    monkeypatch.setattr(triton_decode, "FEW_QUERIES", 64)
    check(1, 2, 1, 40, 35, 8, 8)
    assert split_calls


@pytest.mark.parametrize("dtype", [BF16, F16, F64])
@pytest.mark.parametrize(
    "causal, p, window", [(True, 0.0, None), (True, 0.3, 30), (False, 0.3, None)]
)
def test_every_dtype(dtype, causal, p, window, split_calls):
    check(1, 2, 1, 6, 70, 16, 8, dtype=dtype, causal=causal, p=p, window=window)
    assert split_calls


@pytest.mark.parametrize("D, DV", [(1, 3), (40, 24), (100, 256), (256, 5)])
def test_every_head_size(D, DV, split_calls):
    check(1, 1, 1, 3, 50, D, DV)
    assert split_calls


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout(p, split_calls):
    check(2, 2, 2, 4, 70, 8, 8, p=p)
    assert split_calls


def test_the_shipped_configuration(monkeypatch, split_calls):
    monkeypatch.setattr(triton_decode, "LEAST_KEYS", 256)
    monkeypatch.undo()
    assert triton_decode.LEAST_KEYS == 256
    assert triton_decode.pays(1, 1, 2, 600, None)
    check(1, 3, 1, 2, 600, 8, 8)


def options(causal=True, window=None):
    return (causal, 0.35, 0.0, SEED, window)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about inf - inf
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_bad_key_reaches_the_rows_that_see_it(which, bad, split_calls):
    Tq, Tk, at = 6, 70, 66  # queries 0 and 1 do not see it
    g = torch.Generator().manual_seed(0)
    q, k, v = normal(g, 1, 2, Tq, 8), normal(g, 1, 1, Tk, 8), normal(g, 1, 1, Tk, 8)
    clean = triton_impl.forward(q, k, v, *options())
    {"k": k, "v": v}[which][0, 0, at, 3] = bad
    out, lse = triton_impl.forward(q, k, v, *options())
    sees = visible(Tq, Tk, True, None)[:, at]
    assert sees.tolist() == [False, False, True, True, True, True]
    assert torch.equal(out[:, :, ~sees], clean[0][:, :, ~sees])
    assert torch.equal(lse[:, :, ~sees], clean[1][:, :, ~sees])
    if which == "v":
        assert torch.equal(lse, clean[1])
        assert not out[:, :, sees, 3].isfinite().any()
        other = torch.arange(8) != 3
        assert torch.equal(out[..., other], clean[0][..., other])
    elif math.isnan(bad):
        assert out[:, :, sees].isnan().all()
        assert lse[:, :, sees].isnan().all()
    assert len(split_calls) == 2


def test_scores_far_from_zero(split_calls):
    for size in (-62720.0, 1e4):
        q, k = torch.ones(1, 1, 1, 4), torch.full((1, 1, 60, 4), size / 4)
        v = normal(torch.Generator().manual_seed(0), 1, 1, 60, 4)
        out, lse = triton_impl.forward(q, k, v, True, 1.0, 0.0, 0, None)
        exact = v.double().mean(2, keepdim=True)
        own = (v.mean(2, keepdim=True) - exact).abs().max()
        noise = 2 * ((exact.float() + 0.3 - 0.3).double() - exact).abs().max()
        assert (out - exact).abs().max() <= 2 * own + noise
        step = torch.finfo(F32).eps * abs(size)
        assert abs(lse.double().item() - size - math.log(60)) <= step
    assert len(split_calls) == 2


def test_the_number_of_parts_is_a_function_of_sizes(monkeypatch):
    monkeypatch.undo()
    for B, Hkv, keys in [(1, 1, 1), (1, 8, 8192), (4, 12, 300), (64, 8, 8192), (1, 1, 10**6)]:
        parts = triton_decode.parts_of(B, Hkv, keys)
        assert 1 <= parts <= 64
        assert parts == 1 or keys > triton_decode.LEAST_KEYS
        assert parts == 1 or B * Hkv * (parts - 1) < triton_decode.PROGRAMS
    assert not triton_decode.pays(1, 8, 17, 8192, None)
    assert not triton_decode.pays(64, 8, 1, 8192, None)
    assert not triton_decode.pays(1, 8, 1, 8192, 200)
    assert triton_decode.pays(1, 8, 1, 8192, None)


def test_same_bits_twice(split_calls):
    g = torch.Generator().manual_seed(3)
    q, k, v = normal(g, 1, 4, 3, 8), normal(g, 1, 2, 90, 8), normal(g, 1, 2, 90, 8)
    drawn = (True, 0.35, 0.2)
    first = triton_impl.forward(q, k, v, *drawn, SEED, None)
    again = triton_impl.forward(q, k, v, *drawn, torch.tensor(SEED), None)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(split_calls) == 2
