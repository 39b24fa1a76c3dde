"""The fused block: the bits of the ops one by one, and out of the way when someone looks inside."""

import itertools

import pytest
import torch
from equivalence import require
from torch.utils.checkpoint import checkpoint

import gptk
from gptk import GPT, GPTConfig, block_native
from gptk.block import BlockFunction
from gptk.block_native import NativeBlockFunction
from gptk.model import Block
from gptk.ops import contract
from gptk.ops.cpp_epilogue import own

BACKENDS = ["cpp", "cpp call by call", "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name, _, call_by_call = request.param.partition(" ")
    if call_by_call:
        monkeypatch.setattr(block_native, "shape_of", lambda *_, **__: None)
    return require(name)


def tiny(backend, dropout=0.0, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = dict(block_size=9, vocab_size=17, n_layer=2, n_head=2, n_embd=12, dropout=dropout)
    return GPT(GPTConfig(**{**sizes, **changes}), backend=backend).to(dtype)


def one_by_one(monkeypatch):
    monkeypatch.setattr(Block, "_kernels", lambda self, x: None)


def run(model, autocast=False, seed=5):
    idx = torch.arange(2 * 8).reshape(2, 8) % 17
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(idx[:, :-1], idx[:, 1:], seed=seed)
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_bits_are_those_of_the_ops_one_by_one(backend, dropout, bias, autocast, monkeypatch):
    model = tiny(backend, dropout, bias=bias)
    fused = run(model, autocast)
    one_by_one(monkeypatch)
    equal(fused, run(model, autocast))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(backend, dtype, monkeypatch):
    model = tiny(backend, 0.2, dtype)
    fused = run(model)
    one_by_one(monkeypatch)
    equal(fused, run(model))


def test_every_subset_of_a_block_may_be_frozen(monkeypatch):
    require("cpp")
    model = tiny("cpp", 0.2)
    names = [n for n, _ in model.h[1].named_parameters()]
    subsets = [{n} for n in names] + [set(names) - {n} for n in names] + [set(), set(names)]
    results = []
    for fuse, frozen in itertools.product((True, False), subsets):
        if not fuse:
            one_by_one(monkeypatch)
        for name, parameter in model.h[1].named_parameters():
            parameter.requires_grad_(name not in frozen)
        results.append(run(model))
    for fused, single in zip(results[: len(subsets)], results[len(subsets) :], strict=True):
        equal(fused, single)


def spied(model, functions=(BlockFunction, NativeBlockFunction)):
    """How often one of the functions runs."""
    seen = []

    def spy(original):
        return lambda *args: seen.append(1) or original(*args)

    with pytest.MonkeyPatch.context() as patch:
        for function in functions:
            patch.setattr(function, "apply", spy(function.apply))
        run(model)
    return len(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_call_where_the_products_are_the_extensions(dtype):
    require("cpp")
    ours = dtype != torch.float64 and own(dtype, 14)
    assert spied(tiny("cpp", dtype=dtype), [NativeBlockFunction]) == (2 if ours else 0)
    assert spied(tiny("cpp", dtype=dtype), [BlockFunction]) == (0 if ours else 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.ln_1, "dropout", 0.5),
        lambda block: block.attn.eval(),
        lambda block: setattr(block.mlp, "backend", "torch"),
    ],
    ids=["dropout", "eval", "backend"],
)
def test_parts_that_differ_run_one_by_one(change):
    require("cpp")
    model = tiny("cpp", 0.2)
    change(model.h[0])
    assert spied(model) == 1


def test_a_frozen_input_needs_no_gradient(backend):
    block = tiny(backend).h[0]
    needs = ((True, False), (False, True), (False, False))
    branch, x = torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    both = None
    for need_branch, need_x in ((True, True), *needs):
        b, r = branch.clone().requires_grad_(need_branch), x.clone().requires_grad_(need_x)
        block.zero_grad(set_to_none=True)
        out, h = block(b, r, 0, 0, None)
        (out.sum() + 2 * h.sum()).backward()
        found = (b.grad, r.grad, *(p.grad for p in block.parameters()))
        both = both or found
        equal(found[2:], both[2:])
        equal(found[:2], (both[0] if need_branch else None, both[1] if need_x else None))


@pytest.mark.parametrize("index", [0, 1])
def test_only_one_of_the_outputs_is_used(backend, index, monkeypatch):
    block = tiny(backend, 0.2).h[0]
    branch, x = (torch.randn(2, 3, 12, requires_grad=True) for _ in range(2))

    def gradients():
        return torch.autograd.grad(block(branch, x, 3, 0, None)[index].sum(), (branch, x))

    fused = gradients()
    one_by_one(monkeypatch)
    equal(fused, gradients())


def test_named_and_auto_take_it_and_torch_does_not():
    require("cpp")
    assert spied(tiny("cpp")) == spied(tiny("auto")) == spied(tiny(None)) == 2
    assert spied(tiny("torch")) == 0
    with gptk.use_backend("torch"):
        assert spied(tiny(None)) == 0


def test_a_hook_or_another_layer_inside_sees_the_ops_one_by_one(backend):
    model = tiny(backend)
    shapes = []
    model.h[0].attn.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    model.h[1].mlp.c_fc = torch.nn.utils.parametrizations.weight_norm(model.h[1].mlp.c_fc)
    assert spied(model) == 0
    assert shapes == [(2, 7, 12)]


def test_gradients_of_leaves_do_not_share_memory(backend):
    block = tiny(backend).h[0]
    branch, x = (torch.randn(2, 3, 12, requires_grad=True) for _ in range(2))
    grads = []
    for _ in range(2):
        out, h = block(branch, x, 0, 0, None)
        (out.sum() + 2 * h.sum()).backward()
        grads.append((branch.grad.clone(), x.grad.clone()))
    for once, twice in zip(*grads, strict=True):
        torch.testing.assert_close(twice, 2 * once)


def test_activation_checkpointing_gives_the_same_gradients(backend):
    block = tiny(backend, 0.2).h[0].train()
    x = torch.randn(2, 3, 12, requires_grad=True)
    grads = []
    for call in (lambda: block(None, x, 7, 0, None),
                 lambda: checkpoint(block, None, x, 7, 0, None, use_reentrant=False)):  # fmt: skip
        x.grad = None
        sum(t.square().sum() for t in call()).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_decoding_has_the_bits_of_the_ops_one_by_one(backend, dtype, bias, monkeypatch):
    model = tiny(backend, dtype=dtype, bias=bias).eval()
    idx = torch.arange(2 * 9).reshape(2, 9) % 17

    def logits():
        cache = model.new_cache(2)
        with torch.no_grad():
            found = [model(part, cache=cache) for part in idx.split([4, 1, 1, 2, 1], dim=1)]
        return [*found, cache.k, cache.v]

    fused = logits()
    one_by_one(monkeypatch)
    equal(fused, logits())


def test_a_cache_of_another_dtype_holds_what_it_is_given():
    model = tiny(require("cpp")).eval()
    idx = torch.arange(8).reshape(1, 8)
    with torch.no_grad():
        full = model(idx)
        cache = model.new_cache(1, torch.float64)
        parts = [model(part, cache=cache) for part in idx.split([5, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)


def small_cache(model):
    model.config.block_size += 3  # what the cache has no room for
    cache = model.new_cache(2)
    cache.k, cache.v = cache.k[:, :, :, :4].clone(), cache.v[:, :, :, :4].clone()
    return cache


@pytest.mark.parametrize(
    "made", [lambda model: model.new_cache(1), lambda model: model.new_cache(3), small_cache]
)
def test_a_cache_that_does_not_fit_is_refused(backend, made):
    model = tiny(backend).eval()
    cache = made(model)
    with torch.no_grad(), pytest.raises(ValueError, match="cache of"):
        model(torch.zeros(2, 5, dtype=torch.int64), cache=cache)


def test_a_part_of_a_larger_cache_is_written_where_it_lies(backend):
    model = tiny(backend).eval()
    idx = torch.arange(6).reshape(1, 6)
    cache, whole = model.new_cache(1), model.new_cache(1)
    k, v = (torch.zeros(*t.shape[:3], 20, t.shape[4]) for t in (cache.k, cache.v))
    cache.k, cache.v = k[:, :, :, 5:14], v[:, :, :, 5:14]
    with torch.no_grad():
        for part in idx.split([4, 2], dim=1):
            assert torch.equal(model(part, cache=cache), model(part, cache=whole))
    assert torch.equal(cache.k, whole.k)
    assert not k[:, :, :, :5].any()
    assert not k[:, :, :, 14:].any()


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.attn, "c_attn", torch.nn.Linear(12, 12)),
        lambda block: setattr(block.attn, "n_head", 5),
        lambda block: setattr(block.mlp, "c_fc", torch.nn.Linear(12, 40)),
        lambda block: setattr(block.mlp.c_fc, "bias", torch.nn.Parameter(torch.zeros(3))),
        lambda block: setattr(block.ln_2, "weight", torch.nn.Parameter(torch.ones(3))),
    ],
    ids=["c_attn", "n_head", "c_fc", "bias", "norm"],
)
def test_parts_that_do_not_fit_are_an_error(change):
    block = tiny(require("cpp")).h[0]
    change(block)
    with pytest.raises((ValueError, RuntimeError)):
        block(None, torch.randn(2, 3, 12), 0, 0, None)


def test_a_branch_of_another_shape_is_an_error():
    block = tiny(require("cpp")).h[0]
    with pytest.raises((ValueError, RuntimeError)):
        block(torch.randn(1, 1, 12), torch.randn(2, 3, 12), 0, 0, None)


def test_the_threads_of_backward_are_its_own(backend):
    block, before = tiny(backend).h[0], torch.get_num_threads()
    x, grads = torch.randn(2, 3, 12, requires_grad=True), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(1)
            out, h = block(None, x, 0, 0, None)
            torch.set_num_threads(threads)
            grads.append(torch.autograd.grad(out.sum() + h.sum(), x)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grads)


def test_the_default_device_is_not_where_results_go(backend):
    model = tiny(backend)
    with torch.device("meta"):
        found = run_on(model)
    equal(found, run_on(model))


def run_on(model):
    """run(), with its own tensors on the CPU."""
    idx = torch.arange(2 * 8, device="cpu").reshape(2, 8) % 17
    model.zero_grad(set_to_none=True)
    loss = model(idx[:, :-1], idx[:, 1:], seed=5)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_explain_says_that_size_does_not_decide_inside_a_block():
    require("cpp")
    chosen = contract.chosen(tiny("auto"))
    assert {"attention", "mlp"} <= set(chosen["cpp"])
    by_size = ["linear", "linear_cross_entropy", "layer_norm"]  # the head and ln_f
    assert chosen["cpp or torch by size"] == by_size
    assert "linear" in chosen["cpp"]
