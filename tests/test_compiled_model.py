"""The whole model under torch.compile and torch.export: one graph, the bits of eager mode."""

import io

import pytest
import torch
from equivalence import KERNELS, require
from torch._dynamo.testing import CompileCounterWithBackend

import gptk
import gptk.nn
import gptk.optim

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own
V = 61


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=(*KERNELS, "auto"))
def backend(request):
    if request.param != "auto":
        require(request.param, "attention")
    return request.param


@pytest.fixture
def cpp():
    return require("cpp", "attention")


def build(backend, dropout=0.0, n_layer=2):
    torch.manual_seed(0)
    config = gptk.GPTConfig(32, V, n_layer=n_layer, n_head=2, n_embd=16, dropout=dropout)
    return gptk.GPT(config, backend=backend)


def tokens(*shape, seed=1):
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, call, *args, **options):
    model.zero_grad()
    loss = call(*args, **options)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def same(found, right):
    return all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def op_by_op(model):
    """The model without its fused blocks, as it is traced: a hook on a layer switches them off."""
    for block in model.h:
        block.ln_1.register_forward_hook(lambda *_: None)
    return model


def close(found, right):
    """One gradient of the tied matrix is added in another order: a few last digits."""
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_has_the_loss_and_gradients_of_eager(backend):
    model, idx = build(backend, 0.3, n_layer=1), tokens(1, 5)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (torch.tensor(5), torch.tensor(-6)):
        right = loss_and_gradients(model, model, idx, idx, seed=seed)
        found = loss_and_gradients(model, traced, idx, idx, seed=seed)
        assert backend == "auto" or torch.equal(found[0], right[0])
        close(found, right)  # auto: blocks are traced op by op, small ones by torch


def test_the_same_loss_for_equal_int_seeds(cpp):
    model, idx = build(cpp, 0.3, n_layer=1), tokens(2, 9)
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(model, backend=counter, fullgraph=True)
    losses = []
    for seed in (5, 6, 7, 2**50):
        losses.append(traced(idx, idx, seed=seed))
        assert torch.equal(losses[-1], model(idx, idx, seed=seed))
    assert len({float(x) for x in losses}) == 4
    assert counter.frame_count == 2  # the second value makes the seed symbolic
    torch.manual_seed(4)
    drawn = traced(idx, idx)
    torch.manual_seed(4)
    assert torch.equal(drawn, model(idx, idx))
    assert not torch.equal(traced(idx, idx), drawn)


def test_another_batch_or_length_compiles_nothing(cpp):
    model = build(cpp, 0.1)
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(model, backend=counter, fullgraph=True)
    for B, T in ((2, 9), (3, 12), (5, 32), (4, 7)):
        idx = tokens(B, T)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(idx, dim)
        found = loss_and_gradients(model, traced, idx, idx, seed=torch.tensor(3))
        close(found, loss_and_gradients(model, model, tokens(B, T), idx, seed=3))
    assert counter.frame_count == 1


def test_autocast_around_a_compiled_model(cpp):
    model, idx = build(cpp, n_layer=1), tokens(2, 9)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)

    def cast(call):
        def run(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return call(*args)

        return run

    right = loss_and_gradients(model, cast(op_by_op(model)), idx, idx)
    found = loss_and_gradients(model, cast(traced), idx, idx)
    assert torch.equal(found[0], right[0])
    assert all(a.dtype == b.dtype == torch.float32 for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_gives_the_same_logits(strict, cpp):
    model = build(cpp, 0.2).eval()
    T = torch.export.Dim("T", min=2, max=32)
    program = torch.export.export(
        model, (tokens(1, 9),), dynamic_shapes={"idx": {1: T}}, strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (9, 3, 32):
        with torch.no_grad():
            assert torch.equal(loaded(tokens(1, length)), model(tokens(1, length)))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"gptk.layer_norm.default", "gptk.attention.default"} <= called


def test_a_compiled_step_of_the_optimizer(cpp):
    found = []
    for compiled in (False, True):
        model, idx = build(cpp, n_layer=1), tokens(2, 9)
        optimizer = gptk.optim.AdamW(model.parameters(), lr=1e-2, backend=cpp)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(2):
            loss_and_gradients(model, model, idx, idx)
            step()
        found.append([p.detach() for p in model.parameters()])
    assert same(*found)
