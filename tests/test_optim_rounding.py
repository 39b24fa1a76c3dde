"""gptk.optim.AdamW with stochastic rounding: resumed runs, torch's loader, what is refused."""

import copy
import io
import json

import pytest
import torch
from equivalence import require

from gptk.optim import AdamW

SHAPES = ((5, 7), (33,), (2, 3, 4))


@pytest.fixture(params=("torch", "cpp", "triton"))
def backend(request):
    return require(request.param, "adamw")


def parameters():
    generator = torch.Generator().manual_seed(3)
    made = [torch.randn(s, generator=generator).bfloat16() for s in SHAPES]
    return [torch.nn.Parameter(p) for p in made]


def groups(params):
    return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}]


def steps(optimizer, params, numbers, absent=()):
    for number in numbers:
        for i, p in enumerate(params):
            values = torch.linspace(-1.0, 1.0, p.numel()).reshape(p.shape) * (1.0 + 0.1 * number)
            p.grad = None if i in absent else values.to(p.dtype)
        optimizer.step()


def through_files(state):
    """The state dict as torch.save and JSON leave it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    return {**loaded, "param_groups": json.loads(json.dumps(loaded["param_groups"]))}


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(backend):
    whole, parts = parameters(), parameters()
    a = AdamW(groups(whole), lr=1e-3, stochastic_rounding=True, backend=backend)
    steps(a, whole, range(3))
    saved = through_files(a.state_dict())
    for p, q in zip(parts, whole, strict=True):
        p.data.copy_(q.data)
    steps(a, whole, range(3, 6))

    b = AdamW(groups(parts), lr=1e-3, stochastic_rounding=True, backend=backend)
    assert b.param_groups[0]["seed"] != a.param_groups[0]["seed"]
    started = copy.deepcopy(parts)
    b.load_state_dict(saved)
    steps(b, parts, range(3, 6))
    assert equal(whole, parts)
    for p, q in zip(whole, parts, strict=True):
        for name, value in a.state[p].items():
            assert torch.equal(value, b.state[q][name]), name
        assert set(a.state[p]) == {"step", "exp_avg", "exp_avg_sq"}  # no master

    other = AdamW(groups(started), lr=1e-3, stochastic_rounding=True, seed=1, backend=backend)
    state = copy.deepcopy(saved)
    for group in state["param_groups"]:
        group["seed"] = 1
    other.load_state_dict(state)
    steps(other, started, range(3, 6))
    assert not equal(whole, started)  # the seed matters


def test_the_seed_survives_torchs_optimizer():
    params, theirs = parameters(), parameters()
    ours = AdamW(groups(params), lr=1e-3, stochastic_rounding=True, backend="torch")
    steps(ours, params, range(2))
    between = torch.optim.AdamW(groups(theirs), lr=1.0)
    between.load_state_dict(ours.state_dict())
    steps(between, theirs, range(2, 3))
    back = AdamW(groups(parameters()), lr=1.0)
    back.load_state_dict(through_files(between.state_dict()))
    for mine, group in zip(ours.param_groups, back.param_groups, strict=True):
        assert group["stochastic_rounding"] is True
        assert group["seed"] == mine["seed"]


def test_a_state_of_torch_leaves_the_rounding_as_it_is():
    params, theirs = parameters(), parameters()
    torchs = torch.optim.AdamW(theirs, lr=1e-3)
    steps(torchs, theirs, range(2))
    ours = AdamW(params, lr=1.0, stochastic_rounding=True, seed=7, backend="torch")
    ours.load_state_dict(torchs.state_dict())
    (group,) = ours.param_groups
    assert (group["lr"], group["stochastic_rounding"], group["seed"]) == (1e-3, True, 7)
    steps(ours, params, range(2, 3))
    assert "master" not in ours.state[params[0]]


def test_a_copy_has_the_same_seed():
    params = parameters()
    optimizer = AdamW(params, stochastic_rounding=True, backend="torch")
    twin = copy.deepcopy(optimizer)
    copies = twin.param_groups[0]["params"]
    steps(optimizer, params, range(2))
    steps(twin, copies, range(2))
    assert equal(params, copies)


def test_a_parameters_bits_do_not_depend_on_the_others(backend):
    """Its row is its number in the state dict, whichever others have a gradient or a dtype."""
    results = []
    for absent, dtype in (((), torch.bfloat16), ((0,), torch.bfloat16), ((), torch.float32)):
        params = parameters()
        params[0].data = params[0].data.to(dtype)
        optimizer = AdamW(groups(params), stochastic_rounding=True, seed=9, backend=backend)
        steps(optimizer, params, range(3), absent)
        results.append(params[1:])
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def test_equal_parameters_are_rounded_differently(backend):
    start = torch.full((256,), 1.0, dtype=torch.bfloat16)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = AdamW(params, lr=1e-3, stochastic_rounding=True, seed=0, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(params[0], params[1])


def test_the_generator_is_touched_only_for_a_seed():
    torch.manual_seed(11)
    expected = torch.rand(())
    for options, draws in (({}, False), (dict(stochastic_rounding=True, seed=3), False),
                           (dict(stochastic_rounding=True), True)):  # fmt: skip
        torch.manual_seed(11)
        AdamW(parameters(), **options)
        assert bool(torch.rand(()) != expected) == draws
    seeds = []
    for _ in range(2):
        torch.manual_seed(11)
        optimizer = AdamW(groups(parameters()), stochastic_rounding=True)
        seeds.append([group["seed"] for group in optimizer.param_groups])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 1


def test_one_group_alone_may_be_rounded_so(backend):
    params = parameters()
    mixed = groups(params)
    mixed[0]["stochastic_rounding"] = True
    optimizer = AdamW(mixed, backend=backend)
    assert isinstance(optimizer.param_groups[0]["seed"], int)
    assert optimizer.param_groups[1]["seed"] is None
    steps(optimizer, params, range(2))
    assert ["master" in optimizer.state[p] for p in params] == [False, True, True]
    optimizer.param_groups[1]["stochastic_rounding"] = True  # where masters are
    before = copy.deepcopy([*params, optimizer.state_dict()["state"]])
    with pytest.raises(ValueError, match=r"master.*not both"):
        optimizer.step()
    assert equal(params, before[:-1])
    for i, state in before[-1].items():
        assert all(torch.equal(v, optimizer.state[params[i]][k]) for k, v in state.items())
    for p in params[1:]:
        del optimizer.state[p]["master"]
    optimizer.step()
    assert isinstance(optimizer.param_groups[1]["seed"], int)
    assert not any("master" in optimizer.state[p] for p in params)


def test_stored_masters_are_refused():
    params = parameters()
    with_masters = AdamW(groups(params), backend="torch")
    steps(with_masters, params, range(1))
    saved = with_masters.state_dict()
    for group in saved["param_groups"]:  # as gptk without this option wrote them
        del group["stochastic_rounding"], group["seed"]
    optimizer = AdamW(groups(parameters()), stochastic_rounding=True, backend="torch")
    with pytest.raises(ValueError, match="parameter 0 has a float32 master"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
    plain = AdamW(groups(parameters()), backend="torch")
    plain.load_state_dict(saved)
    assert all("master" in state for state in plain.state.values())


def test_float16_and_wrong_seeds_are_refused(backend):
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match="float16"):
        AdamW([half], stochastic_rounding=True)
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = AdamW([p], stochastic_rounding=True, backend=backend)
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="float16"):
        optimizer.step()
    assert not optimizer.state
    for seed in (-1, 2**64, 0.5):
        with pytest.raises(ValueError, match="seed"):
            AdamW([half], seed=seed)
