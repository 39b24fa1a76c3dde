"""One step: accumulation by token count, NaN never applied, validation without a trace."""

import contextlib
import io
import json
import math

import pytest
import torch
from equivalence import require
from torch import nn

from gptk import GPT, GPTConfig
from gptk.train import options, start
from gptk.train.evaluate import Interrupted, evaluate
from gptk.train.loop import NonFinite, train
from gptk.train.schedule import learning_rate
from gptk.train.step import accumulate
from gptk.train.stop import Stop

BACKENDS = ["torch", "cpp", "triton"]
SIZES = {"block_size": 6, "vocab_size": 13, "n_layer": 1, "n_head": 2, "n_embd": 8}


def tiny(backend="torch", **changes):
    require(backend)
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **changes}), backend=backend).double()


def request(folder, *words):
    if not (folder / "data.txt").exists():
        (folder / "data.txt").write_text("to be, or not to be: that is the question.\n\n" * 60)
    return options.parse(
        [
            f"--data={folder / 'data.txt'}",
            "--tokenizer=char",
            "--n-layer=1",
            "--n-head=2",
            "--n-embd=16",
            "--block-size=16",
            "--batch-size=4",
            "--max-steps=6",
            "--eval-interval=3",
            "--save-interval=2",
            "--warmup-steps=2",
            "--dtype=float32",
            "--device=cpu",
            "--backend=torch",
            f"--out={folder / 'run'}",
            *words,
        ]
    )


def records(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


# ---- accumulation --------------------------------------------------------------------------


class Given(nn.Module):
    """Its loss on token i is `scale` times losses[i]."""

    def __init__(self, losses):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.losses = torch.tensor(losses, dtype=torch.float64)

    def forward(self, idx, targets, reduction, seed):
        assert reduction == "sum"
        return self.scale * self.losses[idx[targets != -100]].sum()


def test_the_loss_is_the_mean_over_all_targets_of_the_step():
    losses = [[2.0, 4.0], [1.0], [], [3.0, 3.0, 2.0]]
    model = Given([x for part in losses for x in part])
    micro_batches, first = [], 0
    for part in losses:
        idx = torch.zeros(1, 4, dtype=torch.int64)
        targets = torch.full((1, 4), -100)
        idx[0, : len(part)] = torch.arange(first, first + len(part))
        targets[0, : len(part)] = 1
        micro_batches.append((idx, targets))
        first += len(part)
    loss, tokens = accumulate(model, micro_batches, seed=1, step=0)
    assert (float(loss), tokens) == (pytest.approx(15 / 6, rel=1e-12), 6)
    assert float(model.scale.grad) == pytest.approx(15 / 6, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_split_gives_the_gradient_of_the_whole_batch(backend):
    model = tiny(backend)
    idx = torch.arange(48).reshape(8, 6) % 13
    targets = (idx * 5 + 1) % 13
    targets[2:4] = -100  # a micro-batch without a target
    targets[5, 1:] = -100
    gradients = []
    for sizes in ([8], [2, 2, 2, 2], [1, 1, 2, 4], [3, 5]):
        model.zero_grad()
        parts = list(zip(idx.split(sizes), targets.split(sizes), strict=True))
        loss, tokens = accumulate(model, parts, seed=1, step=0)
        assert tokens == int((targets != -100).sum())
        assert loss.item() == pytest.approx(model(idx, targets).item(), rel=1e-6)
        gradients.append([p.grad.clone() for p in model.parameters()])
    for other in gradients[1:]:
        for whole, split in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(whole, split)
    assert any(g.abs().sum() > 0 for g in gradients[0])


def test_a_step_without_any_target_is_a_finite_zero():
    model = tiny()
    loss, tokens = accumulate(
        model, [(torch.ones(1, 6, dtype=torch.int64), torch.full((1, 6), -100))], seed=1, step=0
    )
    assert (float(loss), tokens) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_are_a_function_of_seed_step_and_micro_batch(backend):
    model = tiny(backend, dropout=0.5)
    batch = (torch.arange(6)[None], torch.arange(1, 7)[None])

    def losses(**how):
        torch.manual_seed(99)
        before = torch.get_rng_state()
        loss = float(accumulate(model, [batch], **how)[0])
        assert torch.equal(torch.get_rng_state(), before)
        return loss

    first = losses(seed=1, step=5)
    assert losses(seed=1, step=5) == first
    others = [losses(seed=1, step=6), losses(seed=2, step=5)]
    others.append(2 * float(accumulate(model, [batch, batch], seed=1, step=5)[0]) - first)
    assert all(abs(other - first) > 1e-6 for other in others)


# ---- validation ----------------------------------------------------------------------------


def test_validation_is_the_exact_mean_and_leaves_no_trace():
    model = tiny(dropout=0.5)
    model.h[0].mlp.eval()
    modes = [m.training for m in model.modules()]
    idx = torch.arange(30).reshape(5, 6) % 13
    targets = (idx + 1) % 13
    targets[4, 3:] = -100
    token_bytes = torch.arange(13) % 4  # of zero to three bytes
    batches = [(idx[:2], targets[:2]), (idx[2:], targets[2:])]
    before = torch.get_rng_state()
    scores = [evaluate(model, batches, token_bytes, contextlib.nullcontext()) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert scores[0] == scores[1]
    with torch.no_grad():
        losses = model.eval()(idx, targets, reduction="none").flatten()
    nats = float(losses.sum())
    flat = targets.flatten()
    text = (flat != -100) & (token_bytes[flat.clamp_min(0)] > 0)
    assert 0 < text.sum() < 27  # a token of no bytes counts in nats and not in bits
    n_bytes = int(token_bytes[flat[text]].sum())
    assert scores[0].tokens == 27
    assert scores[0].nats == pytest.approx(nats / 27, rel=1e-6)
    assert scores[0].bits_per_byte == pytest.approx(
        float(losses[text].sum()) / math.log(2) / n_bytes, rel=1e-6
    )


def test_validation_stops_when_asked():
    model = tiny()
    batch = (torch.zeros(1, 6, dtype=torch.int64),) * 2
    with pytest.raises(Interrupted):
        evaluate(model, [batch], torch.ones(13), contextlib.nullcontext(), lambda: True)
    assert model.training


# ---- a run ---------------------------------------------------------------------------------


def test_a_run_logs_every_step_and_every_validation(tmp_path):
    with start.opened(request(tmp_path)) as run, Stop() as stop:
        train(run, stop)
        params = sum(p.numel() for p in run.model.parameters())
    logged = records(tmp_path)
    assert [r["step"] for r in logged] == list(range(7))
    assert [r["step"] for r in logged if "val_loss" in r] == [0, 3, 6]
    assert all(r["bits_per_byte"] > 0 for r in logged if "val_loss" in r)
    fields = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "ms"}
    assert all(fields <= set(r) for r in logged[1:])
    for r in logged[1:]:
        expected = learning_rate(
            r["step"] - 1, max_lr=2e-3, min_lr=2e-4, warmup_steps=2, max_steps=6
        )
        assert r["lr"] == pytest.approx(expected, rel=1e-12)
        assert r["tokens"] == r["step"] * 4 * 16
        assert 0 < r["mfu"] < 1.5
        assert r["grad_norm"] > 0
    assert logged[6]["val_loss"] < logged[0]["val_loss"]
    assert abs(logged[0]["val_loss"] - math.log(run.data.vocab_size)) < 0.5
    assert params > 0
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-4", "step-6"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_is_not_applied_and_the_run_stops(tmp_path, value):
    with start.opened(request(tmp_path)) as run:
        weight = run.model.wpe.weight
        weight.register_hook(lambda g: g * (value if run.at.step == 3 else 1.0))
        states = {}
        real = run.optimizer.step

        def step():
            states["before"] = snapshot(run)
            real()

        run.optimizer.step = step
        with pytest.raises(NonFinite, match=r"step 4: the gradient norm.*not applied.*step 2"):
            train(run, Stop())
        assert run.at.step == 3
        assert_equal(states["before"], snapshot(run))
    with start.opened(request(tmp_path, "--resume")) as run:
        assert run.at.step == 2
        assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize(
    "validated, sentence", [(-1, "step 0: the validation loss is nan"), (0, "step 1: the loss is")]
)
def test_a_nan_loss_stops_the_command_with_an_error(tmp_path, validated, sentence):
    with start.opened(request(tmp_path)) as run:
        with torch.no_grad():
            run.model.ln_f.weight[0] = math.nan
        run.at.evaluated = run.at.saved = validated
        before = snapshot(run)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            code = start.train_and_show(run)
        assert code == 1
        assert sentence in said.getvalue()
        assert not (tmp_path / "run/checkpoints").exists()
        assert_equal(before, snapshot(run))


def snapshot(run):
    tensors = {f"model {k}": v.clone() for k, v in run.model.state_dict().items()}
    for index, entry in run.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {kind}": v.clone() for kind, v in entry.items()}
    return tensors


def assert_equal(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor.nan_to_num(7), others[name].nan_to_num(7)), name


def test_low_precision_is_autocast_and_weights_stay_float32(tmp_path):
    with start.opened(request(tmp_path, "--dtype=bfloat16", "--max-steps=2")) as run:
        train(run, Stop())
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        with run.autocast, torch.no_grad():
            idx, _ = run.data.train_batch(0, run.device)
            assert run.model(idx).dtype == torch.bfloat16
    assert records(tmp_path)[2]["loss"] > 0


def test_float16_trains_with_a_scaler_that_resumes(tmp_path):
    words = ("--dtype=float16", "--max-steps=4", "--save-interval=2")
    with start.opened(request(tmp_path, *words)) as run:
        train(run, Stop())
        scale = run.scaler.state_dict()
    with start.opened(request(tmp_path, *words, "--resume")) as run:
        assert run.scaler.state_dict() == scale
    assert all(math.isfinite(r["loss"]) for r in records(tmp_path)[1:])
