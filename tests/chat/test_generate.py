"""Generation: exact filters, cached = uncached at every length, padded ids never drawn."""

import math

import pytest
import torch
from equivalence import require

from gptk import GPT, GPTConfig
from gptk.chat.generate import Sampling, generate, probabilities, stream
from gptk.chat.generate import draw as draw_token
from gptk.text.tokenizer import Tokenizer

BACKENDS = ["torch", "cpp", "triton"]
LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.99, 0.0])
BLOCK, VOCAB = 32, 50


def tiny(backend="torch", dtype=torch.float32, **changes):
    require(backend)
    torch.manual_seed(0)
    sizes = {"block_size": BLOCK, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**{**sizes, **changes}), backend=backend).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start: logits that differ
            parameter.mul_(4)
    return model


def prompt(B, T):
    return (torch.arange(B * T).reshape(B, T) * 7 + 3) % VOCAB


# ---- filters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0},
        {"temperature": 1e-8},
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"top_p": 1e-8},
        {"top_p": 5e-324},
        {"top_k": 1},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_limits_are_greedy(settings, dtype):
    p = probabilities(LOGITS.to(dtype).repeat(2, 1), Sampling(**settings))
    best = int(LOGITS.to(dtype).argmax())
    assert p.tolist() == [[float(i == best) for i in range(5)]] * 2


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"top_k": 5}, {"top_k": 10**6}])
def test_switched_off_filters_change_nothing(settings):
    p = probabilities(LOGITS, Sampling(**settings))
    torch.testing.assert_close(p, LOGITS.double().softmax(-1))
    assert (p > 0).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": -0.1},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": True},
    ],
)
def test_bad_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))) as caught:
        Sampling(**settings)
    assert "\n" not in str(caught.value)


def nucleus(p, mass):
    """The smallest set of most probable ids, of equals the smallest, whose mass reaches `mass`."""
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        if kept and total >= mass - 1e-12:
            break
        kept.add(i)
        total += p[i]
    return kept


@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize(
    "p",
    [
        [0.25, 0.25, 0.25, 0.25],
        [0.1, 0.2, 0.3, 0.4],
        [0.5, 0.25, 0.125, 0.125],
        [0.1] * 10,
        [0.05, 0.9, 0.05],
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(p, top_p):
    kept = probabilities(torch.tensor(p, dtype=torch.float64).log(), Sampling(top_p=top_p))
    expected = nucleus(p, top_p)
    assert set(kept.nonzero()[:, 0].tolist()) == expected
    whole = sum(p[i] for i in expected)
    torch.testing.assert_close(
        kept[sorted(expected)], torch.tensor(p).double()[sorted(expected)] / whole
    )


@pytest.mark.parametrize("k", range(1, 8))
def test_top_k_breaks_ties_by_id(k):
    logits = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, -math.inf, 1.0])
    order = [1, 3, 0, 2, 4, 6]
    kept = probabilities(logits, Sampling(top_k=k))
    assert kept.nonzero()[:, 0].tolist() == sorted(order[:k])


def test_greedy_takes_the_smallest_of_equals():
    assert probabilities(torch.zeros(70_000), Sampling(temperature=0)).argmax() == 0


def test_tokens_are_drawn_as_often_as_is_probable():
    p = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    drawn = draw_token(p.expand(20_000, -1), generator)
    assert drawn.shape == (20_000, 1)
    shares = torch.bincount(drawn[:, 0], minlength=6) / 20_000
    assert (shares[p[0] == 0] == 0).all()
    assert (shares - p[0]).abs().max() < 0.015  # 4 standard deviations


def test_the_ends_of_the_range_draw_no_impossible_token(monkeypatch):
    p = torch.tensor([[0.0, 0.7, 0.3, 0.0]], dtype=torch.float64)
    for u, token in ((0.0, 1), (1.0, 2)):  # 1.0 stands for what rounds up to the total
        monkeypatch.setattr(torch, "rand", lambda *a, u=u, **k: torch.full(a, u, dtype=k["dtype"]))
        assert draw_token(p, torch.Generator()).item() == token


def test_the_filters_apply_in_order():
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    # of the two that top-k leaves, 4/7 and 3/7, the first alone reaches 0.5
    kept = probabilities(p.log(), Sampling(top_k=2, top_p=0.5))
    assert kept.tolist() == [1.0, 0.0, 0.0, 0.0]
    kept = probabilities(p.log(), Sampling(temperature=0.5))
    torch.testing.assert_close(kept, p**2 / (p**2).sum())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        probabilities(torch.tensor([0.0, bad]), Sampling())
    with pytest.raises(ValueError, match="NaN or infinity"):
        probabilities(torch.full((3,), -math.inf), Sampling())


def test_extreme_logits_do_not_overflow():
    p = probabilities(torch.tensor([1e4, -1e4, 1e4]), Sampling(temperature=1e-3))
    assert p.tolist() == [0.5, 0.0, 0.5]


# ---- the KV cache --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 7, 31])
def test_cached_logits_are_the_uncached_ones(backend, B, T):
    model = tiny(backend)
    end = min(BLOCK, T + 2) if backend == "triton" else BLOCK  # the interpreter is slow
    idx = prompt(B, end)
    with torch.no_grad():
        full = model(idx)
        for chunk in (T, 3):
            cache = model.new_cache(B)
            pieces = [model(part, cache=cache) for part in idx[:, :T].split(chunk, dim=1)]
            pieces += [model(idx[:, t : t + 1], cache=cache) for t in range(T, end)]
            cached = torch.cat(pieces, dim=1)
            assert (cached - full).abs().max() < 1e-5
        assert torch.equal(model(idx), full)


@pytest.mark.parametrize("T", [1, 2, 7, 31, 32, 40])
def test_greedy_tokens_are_equal_with_and_without_cache_past_the_block(T):
    model = tiny(dtype=torch.float64)
    idx = prompt(3, T)
    greedy = Sampling(temperature=0)
    runs = [
        torch.stack(list(generate(model, idx, BLOCK + 9, greedy, **how)), dim=1)
        for how in ({}, {"use_cache": False}, {"prefill_chunk": 3}, {})
    ]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    context = torch.cat([idx, runs[0]], dim=1)
    with torch.no_grad():
        for t in range(T, context.shape[1]):  # the definition: the last block_size tokens
            logits = model(context[:, max(0, t - BLOCK) : t])[:, -1]
            assert torch.equal(logits.argmax(-1), context[:, t])


def test_a_batch_gives_what_each_row_gives_alone():
    model = tiny(dtype=torch.float64)
    idx = prompt(3, 7)
    together = torch.stack(list(generate(model, idx, 20, Sampling(temperature=0))), dim=1)
    for row, expected in zip(idx, together, strict=True):
        alone = list(generate(model, row[None], 20, Sampling(temperature=0)))
        assert torch.equal(torch.cat(alone), expected)


# ---- a call leaves nothing behind ----------------------------------------------------------


def draw(model, **how):
    return torch.cat(list(generate(model, prompt(1, 5), 30, **how))).tolist()


def test_a_seed_gives_the_same_text_whatever_happens_between():
    model = tiny()
    first = draw(model, seed=7)
    slow = generate(model, prompt(1, 5), 30, seed=7)
    interleaved = []
    for ids in slow:
        interleaved.append(int(ids))
        draw(model, seed=8)
        torch.rand(3)
    assert interleaved == first != draw(model, seed=8)
    assert draw(model) != draw(model)


def test_modes_gradients_and_generators_are_left_alone():
    model = tiny(dropout=0.5).train()
    model.h[0].eval()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tokens = generate(model, prompt(1, 5), 5, seed=1)
    next(tokens)
    assert model.training
    assert not model.h[0].training
    assert torch.is_grad_enabled()
    list(tokens)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(model, seed=1) == draw(model.eval(), seed=1)


# ---- padded vocabulary ---------------------------------------------------------------------


class Padded(torch.nn.Module):
    """Logits 0 below the tokenizer's vocabulary, 50 on the padding."""

    config = GPTConfig(block_size=8, vocab_size=50304, n_layer=1, n_head=1, n_embd=8)

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, idx):
        logits = torch.zeros(*idx.shape, 50304)
        logits[..., 50257:] = 50.0
        return logits


def test_padding_is_never_drawn():
    def tokens(**how):
        return torch.cat(
            list(
                generate(Padded(), torch.zeros(64, 1, dtype=torch.int64), 8, use_cache=False, **how)
            )
        )

    assert tokens(vocab_size=50257, seed=0).max() < 50257
    assert tokens(seed=0).max() >= 50257  # what would happen


@pytest.mark.parametrize(
    "idx, how, name",
    [
        (torch.zeros(1, 0, dtype=torch.int64), {}, "prompt"),
        (torch.zeros(3, dtype=torch.int64), {}, "prompt"),
        (torch.zeros(1, 1, dtype=torch.int64), {"max_new_tokens": -1}, "max_new_tokens"),
        (torch.zeros(1, 1, dtype=torch.int64), {"vocab_size": VOCAB + 1}, "vocab_size"),
        (torch.zeros(1, 1, dtype=torch.int64), {"vocab_size": 0}, "vocab_size"),
    ],
)
def test_bad_arguments_are_refused_by_name(idx, how, name):
    with pytest.raises(ValueError, match=name):
        list(generate(tiny(), idx, **{"max_new_tokens": 1, **how}))


# ---- text ----------------------------------------------------------------------------------


def texts(stops):
    tokenizer = Tokenizer.make("byte", "")
    model = tiny(vocab_size=256)
    return list(stream(model, tokenizer, "a", 24, Sampling(), seed=3, stops=stops))


def test_a_stream_ends_before_the_first_stop():
    whole = "".join(texts([]))
    assert len(whole) > 8
    for first in (0, 3, 7):
        stop = whole[first : first + 2]
        assert "".join(texts([stop])) == whole[: whole.index(stop)]
        assert "".join(texts(["\x00 never", stop])) == whole[: whole.index(stop)]


def test_an_empty_prompt_stands_for_a_new_line():
    tokenizer = Tokenizer.make("byte", "")
    model = tiny(vocab_size=256)
    one, other = ("".join(stream(model, tokenizer, p, 8, seed=1)) for p in ("", "\n"))
    assert one == other
