"""Memory of calls: kept for the next one per thread and name, bounded; large results."""

import copy
import threading

import pytest
import torch

import gptk.functional as GF
from gptk import native
from gptk.ops import cpp_product
from gptk.ops.linear_cross_entropy import cpp_impl as lce


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


@pytest.mark.parametrize("shape", [(3,), (1025, 1024), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_result_is_an_ordinary_tensor(shape, dtype):
    if native.available() is not None:
        pytest.skip(native.available())
    result = native.empty(shape, dtype)
    assert (result.shape, result.dtype) == (torch.Size(shape), dtype)
    assert result.is_contiguous()
    assert result._base is None
    result.fill_(1)
    assert torch.equal(result, torch.ones(shape, dtype=dtype))
    assert torch.equal(copy.deepcopy(result), result)


def test_a_large_gradient_is_taken_over_and_not_copied(monkeypatch):
    if native.available() is not None:
        pytest.skip(native.available())
    original, addresses = native.empty, []  # not the tensors: what others hold is copied

    def noted(*arguments):
        result = original(*arguments)
        addresses.append(result.data_ptr())
        return result

    for module in (cpp_product, lce):
        monkeypatch.setattr(module, "empty", noted)
    x = torch.randn(8, 1024)
    weight = torch.randn(1025, 1024, requires_grad=True)
    target = torch.arange(8)
    GF.linear_cross_entropy(x, weight, target, backend="cpp").backward()
    assert weight.grad.data_ptr() in addresses


def test_huge_pages_are_asked_for_within_the_result(monkeypatch):
    if native.available() is not None:
        pytest.skip(native.available())
    asked = []

    class Extension:
        ask_for_huge_pages = staticmethod(lambda *where: asked.append(where))

    monkeypatch.setattr(native, "load", Extension)
    native.empty((1024, 1023), torch.float32)
    large = native.empty((1024, 1024), torch.float32)
    assert asked == [(large.data_ptr(), 4 * 2**20)]
