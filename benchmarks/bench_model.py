"""Whole training steps, taken apart by kernel, and generation; see gptk/bench/suite.py."""

from gptk.bench.suite import pytest_generate_tests, test_generate, test_step

__all__ = ["pytest_generate_tests", "test_generate", "test_step"]
