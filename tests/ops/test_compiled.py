"""torch.compile, torch.export, fake tensors, checkpoints: each op is one or two registered ops."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from equivalence import CASES, FUNCTIONS, KERNELS, require, run, tensors, upstreams
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gptk
import gptk.functional as GF
import gptk.nn
import gptk.optim

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own

OFTEN = {
    "layer_norm": ("residual", "two_dims"),
    "attention": ("cached", "gqa", "packed"),
    "gelu": ("odd_tanh",),
    "linear": ("gelu", "no_bias"),
    "mlp": ("odd",),
    "cross_entropy": ("smoothing", "none", "softcap_z_loss"),
    "linear_cross_entropy": ("bias_sum", "none", "softcap_z_loss"),
}
PAIRS = [(op, case) for op, cases in OFTEN.items() for case in cases]
FIRST = [(op, cases[0]) for op, cases in OFTEN.items()]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=KERNELS)
def backend(request):
    return require(request.param, "attention")


@pytest.fixture
def cpp():
    return require("cpp", "attention")


def values_of(op, case, dtype=torch.float32, **changes):
    return CASES[op].inputs(dtype=dtype, **{**CASES[op].CASES[case], **changes})


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def outputs_and_gradients(function, values, differentiable, make=upstreams, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in tensors(values, differentiable).items()}
    result = function(**{**values, **leaves}, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    torch.autograd.backward(
        outputs, [u.to(o.dtype) for u, o in zip(make(outputs), outputs, strict=True)]
    )
    return [o.detach() for o in outputs], {n: t.grad for n, t in leaves.items()}


def assert_equal(found, right):
    """Values, dtypes and strides of outputs and gradients."""
    for a, b in zip(found[0], right[0], strict=True):
        assert torch.equal(a, b)
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
    assert found[1].keys() == right[1].keys()
    for name in right[1]:
        assert found[1][name].dtype == right[1][name].dtype, name
        assert torch.equal(found[1][name], right[1][name]), name


def assert_compiles_to_the_same(op, values, backend, compiler="aot_eager"):
    differentiable = CASES[op].DIFFERENTIABLE
    right = outputs_and_gradients(FUNCTIONS[op], values, differentiable, backend=backend)
    traced = compiled(FUNCTIONS[op], compiler)
    assert_equal(outputs_and_gradients(traced, values, differentiable, backend=backend), right)


def ones(outputs):
    return [torch.ones_like(o) for o in outputs]


class Calls(TorchDispatchMode):
    """The registered ops that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gptk":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op, case", PAIRS)
def test_compiled_gives_the_bits_of_eager(op, case, backend):
    assert_compiles_to_the_same(op, values_of(op, case), backend)


@pytest.mark.parametrize("op, case", [("layer_norm", "residual_dropout"), ("attention", "dropout")])
def test_compiled_drops_what_eager_drops(op, case, backend):
    assert_compiles_to_the_same(op, values_of(op, case), backend)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_any_layout_compiled(op, cpp):
    """Inputs and their gradients with a step of 2 between columns, and 3 for the first result's."""
    values, names = values_of(op, OFTEN[op][0]), CASES[op].DIFFERENTIABLE
    for name, t in tensors(values, (*names, "target")).items():
        values[name] = torch.stack([t, t], dim=-1)[..., 0]

    def apart(outputs):
        ones = [torch.stack([u] * 3, dim=-1)[..., 0] for u in upstreams(outputs)]
        return [u.to(o.dtype) for u, o in zip(ones, outputs, strict=True)]

    right = outputs_and_gradients(FUNCTIONS[op], values, names, apart, backend=cpp)
    found = outputs_and_gradients(compiled(FUNCTIONS[op]), values, names, apart, backend=cpp)
    assert_equal(found, right)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_16_bits_compiled(op, cpp):
    assert_compiles_to_the_same(op, values_of(op, OFTEN[op][0], torch.bfloat16), cpp)


@pytest.mark.parametrize("op", ["layer_norm", "linear_cross_entropy"])
def test_inductor_gives_the_bits_of_eager(op, cpp):
    assert_compiles_to_the_same(op, values_of(op, OFTEN[op][0]), cpp, "inductor")


@pytest.mark.parametrize(
    "op, case, backend", [(*p, "cpp") for p in PAIRS] + [(*p, "triton") for p in FIRST]
)
def test_registered_ops_pass_opcheck(op, case, backend):
    """Schema, autograd's registration, fake kernels, AOTAutograd with dynamic shapes."""
    require(backend, op)
    with Calls() as seen:
        outputs_and_gradients(
            FUNCTIONS[op], values_of(op, case), CASES[op].DIFFERENTIABLE, backend=backend
        )
    assert [func.__name__.partition(".")[0] for func, _ in seen.calls] == [op, f"{op}_backward"]
    for func, args in seen.calls:
        plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        opcheck(func, plain)
        if func is seen.calls[0][0]:
            opcheck(func, args)


def test_opcheck_sees_dropout_and_seeds(cpp):
    for op, case in (("layer_norm", "residual_dropout"), ("attention", "dropout")):
        with Calls() as seen:
            run(op, values_of(op, case), cpp)
        for func, args in seen.calls:
            opcheck(func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_only_what_requires_a_gradient_has_one(op, cpp):
    values = values_of(op, OFTEN[op][0])
    names = list(tensors(values, CASES[op].DIFFERENTIABLE))
    choices = [set(c) for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]
    for required in choices[:2] + choices[-1:]:
        found = []
        for function in (FUNCTIONS[op], compiled(FUNCTIONS[op])):
            torch._dynamo.reset()
            leaves = {n: values[n].clone().requires_grad_(n in required) for n in names}
            result = function(**{**values, **leaves}, backend=cpp)
            outputs = [result] if torch.is_tensor(result) else list(result)
            torch.autograd.backward(outputs, [torch.full_like(o, 1.5) for o in outputs])
            found.append({n: t.grad for n, t in leaves.items()})
        for name in names:
            assert (found[1][name] is not None) == (name in required)
            if name in required:
                assert torch.equal(found[1][name], found[0][name]), name


def test_a_gradient_for_one_of_two_results(backend):
    values = values_of("layer_norm", "residual")
    leaves = ("input", "weight", "bias", "residual")
    for which in range(2):
        found = []
        for function in (GF.layer_norm, compiled(GF.layer_norm)):
            given = {n: values[n].clone().requires_grad_() for n in leaves}
            function(**{**values, **given}, backend=backend)[which].square().sum().backward()
            found.append({n: t.grad for n, t in given.items()})
        for name, right in found[0].items():
            same = found[1][name]
            assert torch.equal(same, right) if right is not None else not same.any(), name


SIZES = {
    "layer_norm": [dict(shape=(B, T, 24)) for B, T in ((2, 5), (3, 7), (4, 9))],
    "attention": [dict(B=B, Tq=T, Tk=T) for B, T in ((2, 5), (3, 7), (4, 9))],
    "gelu": [dict(shape=(B, T, 31)) for B, T in ((2, 5), (3, 7), (4, 9))],
    "linear": [dict(shape=(B, T, 17)) for B, T in ((2, 5), (3, 7), (4, 9))],
    "mlp": [dict(shape=(B, T, 7)) for B, T in ((2, 5), (3, 7), (4, 9))],
    "cross_entropy": [dict(N=N) for N in (5, 7, 9)],
    "linear_cross_entropy": [dict(shape=(N, 8)) for N in (5, 7, 9)],
}


@pytest.mark.parametrize("op", FUNCTIONS)
def test_another_batch_or_length_compiles_nothing(op, cpp):
    counter = CompileCounterWithBackend("aot_eager")
    traced = compiled(FUNCTIONS[op], counter)
    for sizes in SIZES[op]:
        values = values_of(op, OFTEN[op][0], **sizes)
        for name in (*CASES[op].DIFFERENTIABLE, "target"):
            t = values.get(name)
            if not torch.is_tensor(t):
                continue
            rows = 1 if op == "cross_entropy" and name == "input" else t.dim() - (t.dim() > 1)
            if "weight" not in name and "bias" not in name:
                for dim in (0, 2) if op == "attention" else range(rows):
                    torch._dynamo.mark_dynamic(t, dim)
        marked = {n: t for n, t in values.items() if torch.is_tensor(t)}
        result = traced(**values, backend=cpp)
        outputs = [result] if torch.is_tensor(result) else result
        right = FUNCTIONS[op](**{**values, **marked}, backend=cpp)
        for a, b in zip(outputs, [right] if torch.is_tensor(right) else right, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_an_int_seed_is_compiled_once_for_all(cpp):
    counter = CompileCounterWithBackend("aot_eager")
    values = values_of("layer_norm", "residual_dropout")
    traced = compiled(GF.layer_norm, counter)
    for seed in (1, 2, -5, 2**40, 2**62 + 3, 77):  # the second value makes the argument symbolic
        right = GF.layer_norm(**{**values, "seed": seed}, backend=cpp)
        for a, b in zip(traced(**{**values, "seed": seed}, backend=cpp), right, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 2
    for seed in (2**63 + 1, 2**64 - 1):
        right = GF.layer_norm(**{**values, "seed": seed}, backend=cpp)
        for a, b in zip(traced(**{**values, "seed": seed}, backend=cpp), right, strict=True):
            assert torch.equal(a, b)


def test_a_tensor_seed_is_compiled_once(cpp):
    counter = CompileCounterWithBackend("aot_eager")
    values = values_of("attention", "dropout")
    traced = compiled(GF.attention, counter)
    for seed in (1, -(2**63), 2**63 - 1):
        given = {**values, "seed": torch.tensor(seed)}
        assert torch.equal(traced(**given, backend=cpp), GF.attention(**given, backend=cpp))
    assert counter.frame_count == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_drawn_seed_is_new_at_each_call_and_manual_seed_governs_it(compiler, cpp):
    layer = gptk.nn.LayerNorm(64, dropout=0.5, backend=cpp)
    branch, x = torch.ones(8, 64), torch.zeros(8, 64)

    def twice():
        return torch.stack([layer(branch, x)[1] for _ in range(2)])

    traced = compiled(twice, compiler)
    torch.manual_seed(3)
    first, second = traced(), traced()
    torch.manual_seed(3)
    assert torch.equal(traced(), first)
    masks = [*first, *second]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    if compiler == "aot_eager":
        torch.manual_seed(3)
        assert torch.equal(twice(), first)


MODULES = {
    "LayerNorm": (lambda b: gptk.nn.LayerNorm(8, backend=b), [(2, 3, 8)]),
    "GELU": (lambda b: gptk.nn.GELU("tanh", backend=b), [(2, 3, 8)]),
    "Linear": (lambda b: gptk.nn.Linear(8, 5, activation="gelu", backend=b), [(2, 3, 8)]),
    "MLP": (lambda b: gptk.nn.MLP(8, backend=b), [(2, 3, 8)]),
    "attention": (lambda b: gptk.nn.CausalSelfAttention(8, 2, backend=b), [(2, 3, 8)]),
    "CrossEntropyLoss": (lambda b: gptk.nn.CrossEntropyLoss(backend=b), [(6, 5), (6,)]),
    "LinearCrossEntropyLoss": (
        lambda b: gptk.nn.LinearCrossEntropyLoss(8, 5, backend=b),
        [(2, 3, 8), (2, 3)],
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_in_one_graph(name, backend):
    build, shapes = MODULES[name]
    torch.manual_seed(0)
    layer = build(backend)
    x = torch.randn(shapes[0])
    targets = [torch.randint(0, 5, s) for s in shapes[1:]]
    found = []
    for call in (layer, compiled(layer)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf, *targets)
        y.sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["linear", "mlp", "linear_cross_entropy", "attention"])
def test_autocast_inside_of_the_compiled_function(op, cpp):
    def cast(**values):
        with torch.autocast("cpu", torch.bfloat16):
            return FUNCTIONS[op](**values)

    values, names = values_of(op, OFTEN[op][0]), CASES[op].DIFFERENTIABLE
    right = outputs_and_gradients(cast, values, names, backend=cpp)
    assert_equal(outputs_and_gradients(compiled(cast), values, names, backend=cpp), right)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_checkpoints_around_an_op(op, reentrant, cpp):
    values, names = values_of(op, OFTEN[op][0]), CASES[op].DIFFERENTIABLE

    def again(**given):
        return checkpoint(lambda *v: FUNCTIONS[op](**dict(zip(given, v, strict=True))),
                          *given.values(), use_reentrant=reentrant)  # fmt: skip

    right = outputs_and_gradients(FUNCTIONS[op], values, names, backend=cpp)
    assert_equal(outputs_and_gradients(again, values, names, backend=cpp), right)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_double_backward_is_refused(op, backend):
    values = values_of(op, OFTEN[op][0])
    name = CASES[op].DIFFERENTIABLE[0]
    for mode in (torch.no_grad(), Calls()):  # by the autograd.Function, by the registered op
        with mode, torch.enable_grad():
            leaf = values[name].clone().requires_grad_()
            result = FUNCTIONS[op](**{**values, name: leaf}, backend=backend)
            first = result[0] if isinstance(result, tuple) else result
            with pytest.raises(RuntimeError, match="no second derivative"):
                torch.autograd.grad(first.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("op", FUNCTIONS)
def test_vmap_is_refused(op, backend):
    values = values_of(op, OFTEN[op][0])
    name = CASES[op].DIFFERENTIABLE[0]

    def one(x):
        return FUNCTIONS[op](**{**values, name: x}, backend=backend)

    with pytest.raises(gptk.Unsupported, match="take backend='torch'"):
        torch.func.vmap(one)(torch.stack([values[name]] * 2))


@pytest.mark.parametrize("op", FUNCTIONS)
def test_fake_tensors_never_reach_a_kernel(op, backend):
    values, names = values_of(op, OFTEN[op][0]), CASES[op].DIFFERENTIABLE

    def compute(values):
        return outputs_and_gradients(FUNCTIONS[op], values, names, ones, backend=backend)

    right = compute(values)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in values.items()}
        inside = compute(fake)
    for outputs, gradients in (inside, compute(fake)):
        for a, b in zip([*outputs, *gradients.values()], [*right[0], *right[1].values()],
                        strict=True):  # fmt: skip
            assert isinstance(a, FakeTensor)
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    with FakeTensorMode(), pytest.raises(Exception, match="FakeTensor"):
        FUNCTIONS[op](**values, backend=backend)  # real tensors in a fake world


def test_fake_models_masks_and_updates(cpp):
    config = gptk.GPTConfig(8, 32, 1, 2, 16, dropout=0.1)
    with FakeTensorMode():
        model = gptk.GPT(config, backend=cpp)
        idx = torch.zeros(2, 8, dtype=torch.int64)
        loss = model(idx, idx)
        loss.backward()
        assert isinstance(model.wte.weight.grad, FakeTensor)
        assert isinstance(gptk.random.keep_mask(3, 4, 5, 0.5), FakeTensor)
        optimizer = gptk.optim.AdamW(model.parameters(), backend=cpp)
        with pytest.raises(RuntimeError, match="adamw_ writes to the addresses"):
            optimizer.step()
    with pytest.raises(RuntimeError, match="adamw_ writes to the addresses"):
        optimizer.step()
    x = torch.zeros(3, 5, device="meta")
    with pytest.raises(gptk.Unsupported, match="device meta"):
        GF.gelu(x, backend=cpp)


def test_a_subclass_takes_the_registered_op(cpp):
    class Named(torch.Tensor):
        pass

    x = torch.randn(3, 5)
    y = GF.gelu(x.as_subclass(Named), backend=cpp)
    assert isinstance(y, Named)
    assert torch.equal(y.as_subclass(torch.Tensor), GF.gelu(x, backend=cpp))


def names_of_graph(function, *args):
    """What each compiled graph calls of gptk's ops, with its backend."""
    graphs = []

    def keep(graph, inputs):
        nodes = [n for n in graph.graph.nodes if str(n.target).startswith("gptk.")]
        graphs.append([(n.target.__name__.partition(".")[0], n.args[-1]) for n in nodes])
        return graph.forward

    return torch.compile(function, backend=keep, fullgraph=True), graphs


def test_use_backend_outside_of_a_compiled_function(cpp):
    traced, graphs = names_of_graph(GF.gelu)
    x = torch.randn(3, 5)
    for name in ("torch", cpp, "torch", cpp, "auto"):
        with gptk.use_backend(name):
            assert torch.equal(traced(x), GF.gelu(x))
    assert graphs == [[], [("gelu", "cpp")], [("gelu", "cpp")]]
    with gptk.use_backend("torch"):  # of this thread only
        thread = threading.Thread(target=traced, args=(x,))
        thread.start()
        thread.join()
    assert len(graphs) == 3


def test_use_backend_inside_of_a_compiled_function(cpp):
    def twice(x):
        with gptk.use_backend("torch"):
            y = GF.gelu(x)
        with gptk.use_backend("cpp"):
            return y, GF.gelu(x)

    traced, graphs = names_of_graph(twice)
    x = torch.randn(3, 5)
    for a, b in zip(traced(x), twice(x), strict=True):
        assert torch.equal(a, b)
    assert graphs == [[("gelu", "cpp")]]


def test_a_backend_that_cannot_run_is_refused_while_tracing(cpp):
    x = torch.randn(3, 4).to(torch.int32)
    with pytest.raises(Exception, match="dtype int32"):
        compiled(lambda x: GF.gelu(x, backend=cpp))(x)


def test_importing_gptk_registers_the_ops_and_no_compiler():
    """An exported program can be loaded where nothing but gptk has been imported."""
    names = [f"{op}{suffix}" for op in FUNCTIONS for suffix in ("", "_backward")]
    code = (
        "import sys, torch, gptk\n"
        f"for name in {names}: getattr(torch.ops.gptk, name).default\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_attention_of_any_head_size_and_of_packed_documents_is_dynamic(backend):
    def loss(q, cu):
        return GF.attention(q, q, q, cu_seqlens_q=cu, causal=True, backend=backend).square().sum()

    traced = compiled(loss, dynamic=True)
    for T, D in ((9, 4), (9, 8), (13, 8)):
        q = torch.randn(1, 2, T, D)
        for cu in (None, torch.tensor([0, 3, T])):
            assert torch.equal(traced(q, cu), loss(q, cu))
