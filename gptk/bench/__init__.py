"""The benchmark suite: each op and whole training steps, against PyTorch, on this machine.

`gptk bench` runs `suite.py` under pytest-benchmark; `pytest benchmarks` runs the same. All
providers of a case are timed in turns, so that a slow moment of the machine hits each of them;
a provider whose answer is wrong is not timed. Rows where gptk loses are rows like any other.
"""
