"""The benchmark suite measures what it says: right answers only, in turns, with true numbers."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gptk.bench import gate, generation, measure, models, report, suite
from gptk.bench.main import main
from gptk.bench.plugin import Replay
from gptk.bench.providers import PYTORCH, TORCH, providers
from gptk.flags import UsageError
from gptk.ops import contract

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "layer_norm": dict(shape=(3, 8), residual=True),
    "attention": dict(B=1, H=2, Tq=5, Tk=5, D=4, causal=True),
    "gelu": dict(shape=(3, 8), approximate="tanh"),
    "linear": dict(shape=(3, 8), N=4),
    "mlp": dict(shape=(3, 8)),
    "cross_entropy": dict(N=4, V=7),
    "linear_cross_entropy": dict(shape=(4, 6), V=7),
}


@pytest.fixture(autouse=True)
def _a_session_of_its_own(monkeypatch):
    """gptk bench starts pytest; under pytest-xdist it would take itself for one of its workers."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


def values(op, dtype=torch.float32):
    return importlib.import_module(f"gptk.ops.{op}.cases").inputs(**SMALL[op], dtype=dtype)


@pytest.mark.parametrize("op", TORCH)
def test_pytorch_and_every_backend_pass_the_gate_and_a_wrong_answer_does_not(op):
    given = values(op)
    for name, function in providers(op, "cpu", torch.float32, ["torch", "cpp"]).items():
        verdict = gate.judge(op, function, given, name)
        assert verdict.passed, name
        if name == PYTORCH:
            assert verdict.ratio == pytest.approx(1.0)

    def doubled(**v):
        result = TORCH[op](**v)
        return tuple(2 * r for r in result) if isinstance(result, tuple) else 2 * result

    assert not gate.judge(op, doubled, given, "doubled").passed


def test_dropout_is_judged_by_the_masks_of_the_definition():
    given = {**values("layer_norm"), "dropout_p": 0.5}
    found = providers("layer_norm", "cpu", torch.float32, ["torch"])
    assert gate.judge("layer_norm", found["gptk torch"], given, "gptk torch").passed
    assert not gate.judge("layer_norm", TORCH["layer_norm"], given, "another mask").passed


def test_providers_take_turns_and_rotate_their_inputs():
    seen = []
    calls = {
        name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)] for name in "ab"
    }
    samples = measure.interleaved(calls)
    assert {len(s) for s in samples.values()} == {measure.MOST_RUNS}
    timed = seen[-2 * measure.MOST_RUNS :]
    assert timed[:6] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_the_replayed_clock_gives_back_the_samples():
    clock = Replay()
    assert clock() > 0
    clock.samples = iter([0.25, 0.5])
    assert [-clock() + clock() for _ in range(2)] == [0.25, 0.5]


def test_peak_memory_counts_what_is_held_together():
    def call():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b + 1

    assert measure.peak_memory(call) in range(8000, 8400)


def small_steps(monkeypatch, dtypes):
    config = models.GPTConfig(8, 11, 2, 2, 8, dropout=0.2)
    monkeypatch.setitem(models.SIZES, "small", models.Size(config, 3))
    backends = ["torch"] + (["cpp"] if contract.availability("cpp") is None else [])
    return models.providers("small", dtypes, backends)


def test_all_steps_start_from_the_same_losses_and_a_wrong_model_does_not_pass(monkeypatch):
    found = small_steps(monkeypatch, [torch.float32, torch.bfloat16])
    assert {name.split()[0] for name in found} == {"PyTorch", "gptk", models.TRUTH}
    assert all(verdict.passed for verdict in models.verdicts(found).values())
    right = found["gptk torch fp32"]
    losses = right.losses()
    assert losses.shape == (24,)
    one_off = losses.clone()
    one_off[7] += 1e-4
    for wrong in (losses * 0, losses * 1.001, -losses, losses * math.nan, one_off, losses[:-1]):
        found["gptk torch fp32"] = right._replace(losses=lambda wrong=wrong: wrong)
        assert not models.verdicts(found)["gptk torch fp32"].passed


def test_bfloat16_alone_is_judged_by_float64_too(monkeypatch):
    found = small_steps(monkeypatch, [torch.bfloat16])
    assert all(verdict.passed for verdict in models.verdicts(found).values())
    right = found["gptk torch bf16"]
    wrong = right.losses() * 1.1
    found["gptk torch bf16"] = right._replace(losses=lambda: wrong)
    assert not models.verdicts(found)["gptk torch bf16"].passed


def test_a_step_trains_and_the_losses_of_the_gate_do_not(monkeypatch):
    for provider in small_steps(monkeypatch, [torch.float32]).values():
        before = provider.losses()
        assert torch.equal(provider.losses(), before)
        for _ in range(20):
            provider.step()
        assert provider.losses().mean() < before.mean()
        provider.forget()


def test_generation_is_judged_by_its_logits(monkeypatch):
    monkeypatch.setitem(generation.SIZES, "small", models.GPTConfig(96, 33, 2, 2, 16))
    backends = ["cpp"] if contract.availability("cpp") is None else []
    found = generation.providers("small", torch.bfloat16, backends)
    assert all(verdict.passed for verdict in generation.verdicts("small", found).values())
    for provider in found.values():
        if provider.logits is not None:
            assert len(provider.run()) == generation.TOKENS
    right = found["gptk torch"]
    found["gptk x"] = right._replace(logits=lambda: right.logits().roll(1, -1))
    assert not generation.verdicts("small", found)["gptk x"].passed
    assert generation.weight_bytes("small", torch.bfloat16) == 2 * (
        33 * 16 + 2 * (12 * 256 + 13 * 16) + 32
    )


def test_work_is_counted_as_in_training(monkeypatch):
    small_steps(monkeypatch, [torch.float32])
    model = models.gptk.GPT(models.SIZES["small"].config)
    plain = models.baseline.GPT(models.SIZES["small"].config)
    assert models.flops("small") == model.flops_per_token(8) * 24
    assert sum(p.numel() for p in plain.parameters()) == model.num_params(non_embedding=False)


def test_an_optimizer_that_does_not_clip_is_not_timed(monkeypatch):
    monkeypatch.setitem(suite.importlib.import_module("gptk.ops.adamw.cases").BENCH, "s",
                        dict(shapes=((3, 4), (5,))))  # fmt: skip
    found = suite.measure_adamw("s", "cpu", ["torch"])
    assert set(found["seconds"]) == {"PyTorch", "gptk torch"}
    clipping = suite.AdamW

    def without(*args, max_grad_norm, **options):
        return clipping(*args, **options)

    monkeypatch.setattr(suite, "AdamW", without)
    found = suite.measure_adamw("s", "cpu", ["torch"])
    assert set(found["seconds"]) == {"PyTorch"}


def test_a_run_is_stored_shown_compared_and_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.01)
    stored = tmp_path / "b.json"
    assert main(["gelu", "--case", "nano", "--backend", "torch", f"--json={stored}"]) == 0
    content = json.loads(stored.read_text())
    assert content["machine_info"]["gptk"]["threads"] == torch.get_num_threads()
    rows = report.rows_of(stored)
    assert [r["provider"] for r in rows[:2]] == ["PyTorch", "gptk torch"]
    assert all(r["n"] >= measure.LEAST_RUNS and 0 < r["share"] for r in rows)
    capsys.readouterr()
    assert main([f"--show={stored}", f"--compare={stored}", f"--plot={tmp_path / 'p'}"]) == 0
    text = capsys.readouterr().out
    assert "gptk torch" in text
    assert "1.00x" in text
    assert {f.name for f in (tmp_path / "p").iterdir()} == {"bars.png", "roofline.png"}


@pytest.mark.parametrize("argv", [["relu"], ["--show=missing.json"], ["gelu", "--case=nothing"]])
def test_wrong_arguments_are_one_sentence(argv):
    with pytest.raises(UsageError):
        main(argv)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_hosts_cost_is_measured_for_every_op(backend):
    """In a process of its own, where Triton compiles."""
    if backend == "triton":
        pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.bench_host", "--backend", backend, "--runs", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(TORCH)
