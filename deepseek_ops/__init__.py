"""deepseek_ops: the ops of the DeepSeek-V3 training system.

Families, one module each (every public function is documented with shapes, dtypes, errors and its section of the
report): `quantize`, `gemm`, `attention`, `rope`, `moe`, `norm`, `activation`, `loss`, `optimizer`; modules built
on them in `deepseek_ops.nn`. `backend("...")` chooses who runs them; `info()` says what is present here.
"""

from . import activation, attention, gemm, loss, moe, norm, optimizer, quantize, rope
from ._build_info import info
from ._checks import ArgumentError
from ._registry import BackendError, backend
from ._version import __version__

__all__ = [
    "ArgumentError",
    "BackendError",
    "__version__",
    "activation",
    "attention",
    "backend",
    "gemm",
    "info",
    "loss",
    "moe",
    "norm",
    "optimizer",
    "quantize",
    "rope",
]
