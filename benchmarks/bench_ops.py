"""Every op's benchmark cases, and AdamW's; see gptk/bench/suite.py.

pytest benchmarks --op layer_norm --benchmark-compare works as with any pytest-benchmark suite. A
row of gptk's holds the host's share of a call, too: what is not inside a kernel.
"""

from gptk.bench.suite import pytest_generate_tests, test_adamw, test_op

__all__ = ["pytest_generate_tests", "test_adamw", "test_op"]
