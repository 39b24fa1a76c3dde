"""Checkpoints: whole or not at all, damage is named, keys fit or are refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gptk import GPT, GPTConfig
from gptk.train import checkpoint
from gptk.train.checkpoint import CheckpointError, load_model, load_tensors, save_tensors

ROOT = Path(__file__).resolve().parents[2]
TINY = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


def tiny(seed=0):
    torch.manual_seed(seed)
    return GPT(TINY)


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def writers(text="a"):
    return {
        "one.txt": lambda path: path.write_text(text),
        "two.bin": lambda path: path.write_bytes(b"\0" * 1000),
    }


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# ---- saving over what is loaded, failures half-way -----------------------------------------


def test_saving_over_the_mapped_file_keeps_the_values(tmp_path):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.tensor([1.0, 2.0, 3.0])}, {})
    first = load_tensors(path)  # alive, its storage may be the file itself
    save_tensors(path, first, {})
    second = load_tensors(path)
    save_tensors(path, {"w": second["w"] + 0}, {})
    for values in (first["w"], second["w"], load_file(path)["w"]):
        assert values.tolist() == [1.0, 2.0, 3.0]
    assert os.listdir(tmp_path) == ["w.safetensors"]


@pytest.mark.parametrize("failing", ["os.fsync", "safetensors.torch.save_file"])
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.tensor([1.0, 2.0, 3.0])}, {})
    before = path.read_bytes()

    def fail(*args):
        if isinstance(args[-1], Path):
            args[-1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises((OSError, CheckpointError)):
        save_tensors(path, {"w": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_failed_publish_leaves_the_checkpoints_before(tmp_path):
    checkpoint.publish(tmp_path, 1, writers(), keep=2)
    before = files(tmp_path)

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-2.*No space left.*intact"):
        checkpoint.publish(tmp_path, 2, {**writers(), "three": full}, keep=1)
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path):
    checkpoint.publish(tmp_path, 1, writers(), keep=2)
    before = files(tmp_path)
    code = f"""
import resource, signal, torch
from pathlib import Path
from gptk.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
big = {{"w": torch.zeros(1_000_000)}}
write = lambda path: checkpoint.save_tensors(path, big, {{}})
try:
    checkpoint.publish(Path({str(tmp_path)!r}), 2, {{"model.safetensors": write}}, 2)
except checkpoint.CheckpointError as error:
    print("refused", error)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("refused"), done.stdout + done.stderr
    assert files(tmp_path) == before
    assert os.listdir(tmp_path) == ["step-1"]


def test_an_occupied_name_is_replaced_and_rescued(tmp_path, monkeypatch):
    checkpoint.publish(tmp_path, 1, writers("old"), keep=2)
    real = Path.rename

    def fail(self, target):
        if self.name.startswith(".tmp"):
            raise OSError(errno.EIO, "input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError):
        checkpoint.publish(tmp_path, 1, writers("new"), keep=2)
    monkeypatch.undo()
    assert (tmp_path / "step-1/one.txt").read_text() == "old"
    assert checkpoint.damage(tmp_path / "step-1") is None
    checkpoint.publish(tmp_path, 1, writers("new"), keep=2)
    assert (tmp_path / "step-1/one.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["step-1"]


def test_recover_clears_up_after_a_killed_writer(tmp_path):
    checkpoint.publish(tmp_path, 1, writers(), keep=2)
    checkpoint.publish(tmp_path, 2, writers(), keep=2)
    (tmp_path / ".tmp-step-3-77").mkdir()
    (tmp_path / ".tmp-step-3-77/one.txt").write_text("half")
    (tmp_path / "step-2").rename(tmp_path / ".old-step-2")  # killed between the two renames
    checkpoint.recover(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]
    checkpoint.recover(tmp_path / "absent")


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 9, 100):
        checkpoint.publish(tmp_path, step, writers(), keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-100"]


# ---- damage --------------------------------------------------------------------------------


def truncate(folder):
    (folder / "two.bin").write_bytes(b"\0" * 999)


def flip(folder):
    (folder / "two.bin").write_bytes(b"\0" * 999 + b"\1")


def empty(folder):
    (folder / "one.txt").write_bytes(b"")


def remove(folder):
    (folder / "one.txt").unlink()


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def torn_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[: len(text) // 2])


def other_format(folder):
    (folder / "manifest.json").write_text('{"format": "x", "version": 9, "files": {}}')


def not_an_object(folder):
    (folder / "manifest.json").write_text("[]")


def outside(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../x"] = {"bytes": 0, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = [
    (truncate, "999 bytes, expected 1000"),
    (flip, "SHA-256"),
    (empty, "0 bytes"),
    (remove, "one.txt"),
    (no_manifest, "manifest.json"),
    (torn_manifest, "incomplete"),
    (other_format, "format"),
    (not_an_object, "incomplete"),
    (outside, "outside"),
]


@pytest.mark.parametrize("hurt, reason", DAMAGES, ids=[f.__name__ for f, _ in DAMAGES])
def test_damage_is_named_and_the_one_before_is_used(tmp_path, hurt, reason):
    for step in (1, 2):
        checkpoint.publish(tmp_path, step, writers(), keep=2)
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step-2"
    hurt(tmp_path / "step-2")
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-1"
    assert len(said) == 1
    assert "step-2" in said[0]
    assert reason in said[0]
    hurt(tmp_path / "step-1")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        checkpoint.newest(tmp_path, said.append)


def test_no_checkpoint_is_none(tmp_path):
    (tmp_path / ".tmp-step-1-5").mkdir()
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    assert checkpoint.newest(tmp_path / "absent", pytest.fail) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x05posix",  # a pickle
        (10**12).to_bytes(8, "little") + b"{}",  # a header of a terabyte
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_tensors(path)


# ---- a model's keys ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_load_and_logits_are_the_saved_models(prefix):
    saved, other = tiny(0), tiny(1)
    tensors, tied = checkpoint.model_tensors(saved)
    idx = torch.arange(8)[None] % 11
    assert not torch.equal(saved(idx), other(idx))
    load_model(other, {prefix + key: t for key, t in tensors.items()}, tied)
    assert torch.equal(saved(idx), other(idx))


def test_a_wrapped_model_is_saved_under_clean_keys_and_loads():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model

    saved, other = tiny(0), tiny(1)
    tensors, tied = checkpoint.model_tensors(Wrapper(saved))
    assert tensors.keys() == checkpoint.model_tensors(saved)[0].keys()
    load_model(Wrapper(other), tensors, tied)
    assert all(
        torch.equal(a, b) for a, b in zip(saved.parameters(), other.parameters(), strict=True)
    )


def renamed(t):
    t["h.0.ln_9.weight"] = t.pop("h.0.ln_1.weight")
    return ["missing: h.0.ln_1.weight", "not in the model: h.0.ln_9.weight"]


def missing(t):
    del t["wpe.weight"], t["ln_f.weight"]
    return ["missing: wpe.weight", "missing: ln_f.weight"]


def wrong_shape(t):
    t["wte.weight"] = torch.zeros(12, 8)
    return ["wte.weight", "(12, 8)", "(11, 8)"]


def twice(t):
    t["module.wpe.weight"] = t["wpe.weight"] + 1
    return ["twice: wpe.weight"]


def untied(t):
    t["lm_head.weight"] = t["wte.weight"] + 1
    return ["lm_head.weight", "tied"]


@pytest.mark.parametrize("spoil", [renamed, missing, wrong_shape, twice, untied])
def test_keys_that_do_not_fit_are_listed_and_nothing_is_loaded(spoil):
    tensors, tied = checkpoint.model_tensors(tiny(0))
    parts = spoil(tensors)
    model = tiny(1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_model(model, tensors, tied)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert equal(before, model.parameters())


def test_a_tied_weight_is_stored_once_and_stays_tied(tmp_path):
    model = tiny(0)
    tensors, tied = checkpoint.model_tensors(model)
    save_tensors(tmp_path / "m.safetensors", tensors, {})
    stored = load_tensors(tmp_path / "m.safetensors")
    assert "wte.weight" in stored
    assert "lm_head.weight" not in stored
    assert tied == {"lm_head.weight": "wte.weight"}
    other = tiny(1)
    load_model(other, stored, tied)
    assert other.lm_head.weight.data_ptr() == other.wte.weight.data_ptr()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    optimizer.step()
    assert torch.equal(other.lm_head.weight, other.wte.weight)
    assert not torch.equal(other.wte.weight, model.wte.weight)


def test_a_checkpoint_of_both_equal_keys_loads():
    saved, other = tiny(0), tiny(1)
    tensors, _ = checkpoint.model_tensors(saved)
    load_model(other, {**tensors, "lm_head.weight": tensors["wte.weight"].clone()}, {})
    assert torch.equal(saved.wte.weight, other.wte.weight)


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_uses():
    model = tiny(0).double()
    idx, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 1]])
    model(idx, targets).backward()
    whole = model.wte.weight.grad.clone()
    model.zero_grad()
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach().clone())  # untied
    model(idx, targets).backward()
    parts = model.wte.weight.grad + model.lm_head.weight.grad
    torch.testing.assert_close(whole, parts)
    assert model.lm_head.weight.grad.abs().sum() > 0
