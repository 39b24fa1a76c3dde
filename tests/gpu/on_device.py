"""Where the tests marked gpu run: on CUDA; or, in `make gpu`'s dry run, tiny on the CPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks`, under plain pytest

DRY = os.environ.get("GPTK_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY else "cuda"
DTYPES = ("float32", "bfloat16", "float16")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not DRY and not torch.cuda.is_available(),
        reason="needs a CUDA device; python -m benchmarks.gpu --dry-run tries these tests on a CPU",
    ),
    # memory is filled with NaN by torch's deterministic mode, which warns of ops that have no other
    pytest.mark.filterwarnings("ignore:.*eterministic:UserWarning"),
]
