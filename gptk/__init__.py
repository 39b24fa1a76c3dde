"""gptk: a GPT whose hot operations exist as PyTorch, as Triton kernels and as a C++ extension.

Importing this package loads torch and nothing heavier; backends load on first use.
"""

__version__ = "0.1.0"

from gptk.model import GPT, GPTConfig
from gptk.ops.contract import Unsupported, explain, use_backend

__all__ = ["GPT", "GPTConfig", "Unsupported", "__version__", "explain", "use_backend"]
