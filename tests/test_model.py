"""The whole model: three backends train alike; causality, caching, tying, autocast."""

import pytest
import torch
from equivalence import KERNELS, error, missing, noise

import gptk
from gptk import GPT, GPTConfig
from gptk.optim import AdamW
from gptk.random import derive_seed

SMALL = dict(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
BACKENDS = ("torch", *KERNELS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    reason = missing("attention", request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def build(backend="torch", seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SMALL, **changes}), backend=backend)


def tokens(B, T, V=50, seed=1):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def losses(backend, text, steps, dropout):
    """Losses of `steps` updates of a tiny GPT on bytes of `text`."""
    B, T = 1, 16
    model = build(backend, block_size=T, vocab_size=128, n_layer=1, dropout=dropout)
    optimizer = AdamW(model.param_groups(0.1), lr=1e-2, max_grad_norm=1.0, backend=backend)
    data = torch.tensor(list(text.encode("ascii")))
    found = []
    for step in range(steps):
        rows = [data[(step * B + b) * T : (step * B + b + 1) * T + 1] for b in range(B)]
        batch = torch.stack(rows)
        loss = model(batch[:, :-1], batch[:, 1:], seed=derive_seed(7, step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kernels", KERNELS)
def test_32_steps_on_shakespeare_give_torchs_losses(kernels, dropout, shakespeare):
    reason = missing("attention", kernels)
    if reason:
        pytest.skip(reason)
    text = shakespeare.read_text(encoding="utf-8")[:2000]
    ours, torchs = losses(kernels, text, 32, dropout), losses("torch", text, 32, dropout)
    assert ((ours - torchs).abs() / torchs).max().item() <= 2e-5
    assert torchs[-1] < 0.95 * torchs[0]  # it learns, so equal losses mean something
    other = losses("torch", text, 2, 0.0 if dropout else 0.2)
    assert abs(other[0] - torchs[0]) / torchs[0] > 2e-5  # and dropout is really on or off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_err_as_little_as_pytorchs(backend, dtype):
    idx = tokens(2, 19)
    exact = build().double()(idx).detach()
    plain, model = build().to(dtype), build(backend).to(dtype)
    own, found = plain(idx).detach(), model(idx).detach()
    assert found.dtype == dtype
    assert error(found, exact) <= 3 * error(own, exact) + noise(exact, dtype)


def test_loss_is_the_cross_entropy_of_the_logits(backend):
    model, idx = build(backend), tokens(3, 8)
    targets = tokens(3, 8, seed=2).masked_fill(torch.rand(3, 8) < 0.3, -100)
    logits = model(idx)
    assert logits.shape == (3, 8, 50)
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets), right)
    total = model(idx, targets, reduction="sum")
    torch.testing.assert_close(total, right * (targets != -100).sum())


def test_a_future_token_changes_no_earlier_logit(backend):
    model, idx = build(backend), tokens(2, 12)
    before = model(idx)
    changed = idx.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    after = model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7], after[:, 7])


def test_a_full_cache_refuses_more(backend):
    model = build(backend).eval()
    cache = model.new_cache(1)
    model(tokens(1, 32), cache=cache)
    with pytest.raises(ValueError, match="33 tokens for block_size=32"):
        model(tokens(1, 1), cache=cache)


def test_head_and_embedding_are_one_parameter_with_both_gradients(backend):
    model, idx = build(backend), tokens(2, 8)
    assert model.lm_head.weight is model.wte.weight
    assert "lm_head.weight" in model.state_dict()
    model(idx, idx).backward()
    untied = build(backend)
    untied.lm_head.weight = torch.nn.Parameter(untied.wte.weight.detach().clone())
    untied(idx, idx).backward()
    both = untied.lm_head.weight.grad + untied.wte.weight.grad
    torch.testing.assert_close(model.wte.weight.grad, both)
    assert untied.wte.weight.grad.abs().max() > 0


def test_a_large_tied_table_gets_its_rows_added_to_the_heads_gradient(backend):
    """The embedding's own gradient is sparse then; what the parameter gets is dense, and right."""
    config = gptk.GPTConfig(8, 4096, 1, 2, 16)
    torch.manual_seed(0)
    ours, theirs = gptk.GPT(config, backend=backend), gptk.GPT(config, backend="torch").double()
    theirs.load_state_dict(ours.state_dict())
    idx = torch.randint(4096, (2, 9))
    idx[0] = idx[0, 0]  # a row that is used again and again
    for _ in range(2):  # the second one is added to the first one's gradient
        for model in (ours, theirs):
            model(idx[:, :-1], idx[:, 1:]).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad.layout == torch.strided, name
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_loss_beside_the_head_gives_the_table_a_dense_gradient_too(backend):
    model = gptk.GPT(gptk.GPTConfig(8, 4096, 1, 2, 16), backend=backend)
    hidden = []
    model.ln_f.register_forward_hook(lambda module, given, out: hidden.append(out[0]))
    idx = torch.randint(4096, (1, 9))
    model(idx[:, :-1], idx[:, 1:])
    hidden[0].square().sum().backward()
    assert model.wte.weight.grad.layout == torch.strided
    assert (model.wte.weight.grad != 0).any(1).sum() == idx[:, :-1].unique().numel()


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_alike():
    """torch.compile breaks its graphs at the kernels, and must not drop what they were given."""
    reason = missing("attention", "cpp")
    if reason:
        pytest.skip(reason)
    grads = []
    for compiled in (False, True):
        model = build("cpp", dropout=0.1)
        run = torch.compile(model, backend="eager") if compiled else model
        for step in range(3):
            run(tokens(2, 16), tokens(2, 16, seed=2), seed=step).backward()
        grads.append([p.grad for p in model.parameters()])
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(eager, other)


def test_state_keys_are_gpt2s():
    keys = set(build().state_dict())
    for name in ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert {f"h.0.{name}.weight", f"h.0.{name}.bias"} <= keys
    assert {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight"} <= keys


def test_dropout_is_seeded_differs_by_call_and_is_off_in_eval(backend):
    model, idx = build(backend, dropout=0.3), tokens(2, 8)
    assert torch.equal(model(idx, idx, seed=5), model(idx, idx, seed=5))
    assert not torch.equal(model(idx, idx, seed=5), model(idx, idx, seed=6))
    torch.manual_seed(3)
    first, second = model(idx, idx), model(idx, idx)
    torch.manual_seed(3)
    assert torch.equal(first, model(idx, idx))
    assert not torch.equal(first, second)
    plain = build(backend)
    assert torch.equal(model.eval()(idx), plain(idx))


def test_autocast_keeps_float32_weight_gradients(backend):
    model, idx = build(backend), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx, idx)
        assert model(idx).dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    exact = build().double()
    exact(idx, idx).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.float32, name
        scale = q.grad.abs().max().item()
        assert error(p.grad, q.grad) <= 0.1 * scale, name
        if name.endswith("c_fc.weight") and backend != "torch":  # not rounded to bf16 on the way
            assert not torch.equal(p.grad, p.grad.bfloat16().float())


def test_groups_counts_and_flops():
    model = build()
    decay, rest = model.param_groups(0.1)
    assert all(p.dim() >= 2 for p in decay["params"])
    assert all(p.dim() < 2 for p in rest["params"])
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    C, L, V = 16, 2, 50
    N = V * C + L * (12 * C * C + 13 * C) + 2 * C
    assert model.num_params() == N
    assert model.num_params(non_embedding=False) == N + 32 * C
    assert model.flops_per_token(8) == 6 * N + 12 * L * C * 8


def test_gpt2_124m_has_its_size():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.num_params(non_embedding=False) == 124_439_808


def test_wrong_sizes_are_refused():
    for wrong in (dict(n_embd=15), dict(n_layer=0), dict(dropout=1.5), dict(vocab_size=0)):
        with pytest.raises(ValueError, match=r"n_head|n_layer|dropout|vocab_size"):
            GPT(GPTConfig(**{**SMALL, **wrong}))
    with pytest.raises(ValueError, match="backend='cuda'"):
        build("cuda")(tokens(1, 2))


def test_ids_that_are_no_batch_are_refused(backend):
    model, idx = build(backend), tokens(2, 8)
    for wrong in (idx[0], idx[None], idx[0, 0]):
        with pytest.raises(ValueError, match=r"idx \(.*\): must be \(B, T\)"):
            model(wrong)
    with pytest.raises(ValueError, match="idx is on meta"):
        model(idx.to("meta"))
    with pytest.raises(ValueError, match="target is on meta"):
        model(idx, idx.to("meta"))
    with pytest.raises(ValueError, match=r"target \(16,\) for rows of logits \(2, 8\)"):
        model(idx, idx.flatten())
    with pytest.raises(RuntimeError, match=r"Long, Int|LongTensor|IntTensor"):
        model(idx.float())
    with pytest.raises(IndexError):
        model(idx + 50)
    assert torch.equal(model(idx.int(), idx.int()), model(idx, idx))


def test_explain_names_what_runs():
    text = gptk.explain(build("torch"))
    for op in ("layer_norm", "attention", "linear", "mlp", "linear_cross_entropy"):
        assert f"{op}" in text
    assert "torch (asked: torch" in text


def test_use_backend_sets_the_default_and_restores_it():
    x = torch.ones(2, 4)
    with gptk.use_backend("torch"):
        assert gptk.functional.gelu(x.requires_grad_()).grad_fn.name() != "GeluFunctionBackward"
    with (
        pytest.raises(ValueError, match="allowed: auto, torch, triton, cpp"),
        gptk.use_backend("x"),
    ):
        pass


def test_unavailable_backends_raise_with_every_reason(monkeypatch):
    monkeypatch.setattr("gptk.ops.contract.availability", lambda b: f"{b} is not here")
    monkeypatch.setattr("gptk.ops.contract._candidates", {})
    with pytest.raises(gptk.Unsupported, match="cpp is not here"):
        gptk.functional.gelu(torch.ones(2), backend="cpp")
