"""Memory that calls keep for the next one: per thread, per name, bounded, never shared by two."""

import threading

import pytest
import torch

from gptk import native


@pytest.fixture(autouse=True)
def _none_before_or_after():
    native.release_workspaces()
    yield
    native.release_workspaces()


def address(name="a", elements=10, dtype=torch.float32):
    return native.workspace(name, elements, dtype).data_ptr()


def test_a_call_finds_the_memory_of_the_one_before():
    first = address()
    assert address(elements=5) == first
    assert native.workspace("a", 3, torch.float32).shape == (10,)
    assert address(name="b") != first
    assert address(dtype=torch.float64) != first
    native.workspace("a", 11, torch.float32)
    assert native.workspace("a", 1, torch.float32).shape == (11,)


def test_what_is_large_goes_back(monkeypatch):
    monkeypatch.setattr(native, "MOST_WORKSPACE", 40)
    assert native.workspace("a", 10, torch.float32) is native.workspace("a", 10, torch.float32)
    assert native.workspace("a", 11, torch.float32) is not native.workspace("a", 11, torch.float32)
    assert native.workspace("a", 1, torch.float32).shape == (10,)


def test_each_thread_has_its_own():
    mine, theirs = native.workspace("a", 10, torch.float32), []
    thread = threading.Thread(
        target=lambda: theirs.append(native.workspace("a", 10, torch.float32))
    )
    thread.start()
    thread.join()
    assert theirs[0].data_ptr() != mine.data_ptr()
    assert address() == mine.data_ptr()


def test_the_callers_modes_do_not_stick_to_it():
    with torch.inference_mode(), torch.device("meta"):
        kept = native.workspace("a", 10, torch.float32)
    assert kept is native.workspace("a", 10, torch.float32)
    assert kept.device.type == "cpu"
    kept.zero_()  # of an inference tensor an error
