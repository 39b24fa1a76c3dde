"""Every op's benchmark cases and the training steps; see gptk/bench/suite.py.

pytest benchmarks --op layer_norm --benchmark-compare works as with any pytest-benchmark suite.
"""

from gptk.bench.suite import (
    pytest_generate_tests,
    test_adamw,
    test_generate,
    test_op,
    test_step,
)

__all__ = ["pytest_generate_tests", "test_adamw", "test_generate", "test_op", "test_step"]
