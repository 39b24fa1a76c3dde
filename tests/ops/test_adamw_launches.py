"""adamw by Triton: how many launches a step takes, and that the host never waits for the device."""

import pytest
import torch
from equivalence import require
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

import gptk.ops.adamw as op
import gptk.optim
from gptk.ops.adamw import triton_impl, triton_norm, triton_tables

NORM = ["_norm_partial_kernel", "_norm_kernel", "_factors_kernel"]
UPDATE = ["_prepare_kernel", "_update_kernel"]
C = 8


def gpt2(dtype=torch.float32, offset=0):
    """Parameters of GPT-2's number and kinds, small: 148, every third one at an odd address."""
    block = [(C,), (C,), (3 * C, C), (3 * C,), (C, C), (C,)]
    block += [(C,), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,)]
    params = []
    for shape in [(50, C), (16, C), *block * 12, (C,), (C,)]:
        count = torch.Size(shape).numel()
        odd = 1 if offset and len(params) % 3 == 0 else 0
        values = torch.ones(count + odd, dtype=dtype)[odd:].view(shape)
        params.append(torch.nn.Parameter(values))
    return params


def groups(params):
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0},
    ]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels, instead of their launches."""
    require("triton", "adamw")
    names = []

    def launch(kernel, grid, device, *args, **meta):
        names.append(kernel.fn.__name__)

    for module in (triton_impl, triton_norm):
        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "dtype, options",
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.float32, {"lr": torch.tensor(1e-3)}),
    ],
    ids=["float32", "masters", "stochastic", "lr"],
)
def test_all_parameters_take_one_launch(launched, dtype, options, offset):
    params = gpt2(dtype, offset)
    assert len(params) == 148
    assert any(p.data_ptr() % 16 for p in params) == bool(offset)
    optimizer = gptk.optim.AdamW(groups(params), backend="triton", **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert launched == UPDATE
    launched.clear()
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert launched == [*NORM, *UPDATE]


def test_every_dtype_takes_a_launch_of_its_own(launched):
    params = gpt2()[:4] + gpt2(torch.bfloat16)[:4]
    lists = [params, [p.detach() for p in params], [p.detach().float() for p in params]]
    lists += [[t.clone() for t in lists[2]], [torch.zeros(()) for _ in params]]
    op.adamw_(*lists, lr=1e-3, max_grad_norm=1.0, backend="triton")
    assert sorted(launched) == sorted([*NORM, *UPDATE, NORM[0], UPDATE[1]])


def test_one_launch_updates_aligned_and_unaligned_tensors_alike():
    """Both branches of the kernel, over blocks that are full and blocks that are not."""
    require("triton", "adamw")
    n = 2 * triton_tables.BLOCK + 3
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for _ in range(4)]
    values[3].square_()
    results = []
    for which in [(), (0,), (1,), (2,), (3,)]:  # g, p, m, v off by four bytes
        g, p, m, v = (
            torch.cat([torch.zeros(1), t])[1:] if i in which else t.clone()
            for i, t in enumerate(values)
        )
        assert sum(t.data_ptr() % 16 != 0 for t in (g, p, m, v)) == len(which)
        op.adamw_([p], [g], [m], [v], [torch.zeros(())], lr=1e-2, max_grad_norm=0.5,
                  backend="triton")  # fmt: skip
        results.append((p, m, v))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class NoSync(TorchDispatchMode):
    """Raises where the host would wait for a device, and counts the operations that it starts."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.counts[name] = self.counts.get(name, 0) + 1
        waits = ("_local_scalar_dense", "is_nonzero", "equal.default", "nonzero")
        assert not any(word in name for word in waits), name
        result = function(*args, **(kwargs or {}))
        if "_to_copy" in name or "copy_" in name:
            source = args[1] if "copy_" in name else args[0]
            assert source.device.type != "cuda" or result.device.type == "cuda", name
        return result


@pytest.fixture
def device(monkeypatch, launched):
    """A GPU whose tensors have no values: whatever asks for one raises."""
    counter = iter(range(16, 2**40, 16))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: next(counter))
    monkeypatch.setattr(op, "resolve", lambda *_: triton_impl)

    def send(parts, device):
        return [torch.empty(p.size, dtype=torch.int64, device=device) for p in parts]

    for module in (triton_impl, triton_norm):
        monkeypatch.setattr(module, "send", send)
    with FakeTensorMode():
        yield torch.device("cuda:0")


@pytest.mark.parametrize("wait", [float, bool, torch.Tensor.item, torch.Tensor.cpu])
def test_the_check_for_waiting_sees_it(device, wait):
    x = torch.ones((), device=device)
    with pytest.raises((AssertionError, RuntimeError)), NoSync():
        wait(x)


@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, {}), (torch.bfloat16, {"stochastic_rounding": True, "seed": 3})],
    ids=["float32", "stochastic"],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_host_never_waits(device, launched, monkeypatch, dtype, options, scaled):
    # fake tensors have no addresses, and the mocked launcher needs none
    monkeypatch.setattr("gptk.ops.adamw.check_addresses", lambda *_: None)
    params = [torch.nn.Parameter(p.detach().to(device)) for p in gpt2(dtype)]
    for p in params:
        p.grad = torch.ones_like(p)
    lr = torch.full((), 1e-3, device=device)
    optimizer = gptk.optim.AdamW(params, lr=1e-3, max_grad_norm=1.0, backend="triton", **options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if scaled:
        optimizer.grad_scale = torch.ones((), device=device)
        optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()  # makes the states
    launched.clear()
    with NoSync() as seen:
        optimizer.step()
    assert launched == [*NORM, *UPDATE]
    assert optimizer.grad_norm.device == optimizer.skipped.device == device
    # views and fresh memory; zeros: one on the host
    free = ("empty", "view", "detach", "split", "unbind", "zeros")
    started = {
        name: count
        for name, count in seen.counts.items()
        if name.startswith("aten.") and not any(word in name for word in free)
    }
    # lr to float64, and into one array with the other scalars
    assert started == {"aten._to_copy.default": 1, "aten.cat.default": 1}
