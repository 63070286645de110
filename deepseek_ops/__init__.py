"""deepseek_ops: the ops of the DeepSeek-V3 training system.

Families, one module each (every public function is documented with shapes, dtypes, errors and its section of the
report): `quantize`, `gemm`, `attention`, `rope`, `moe`, `norm`, `activation`, `loss`, `optimizer`; modules built
on them in `deepseek_ops.nn`. `backend("...")` chooses who runs them; `info()` says what is present here.
Kernel developers: `emulation(seed=...)` sets how the backends `emulated` and `checked` run a kernel, `KernelError`
carries what they found, `last_statistics`, `bank_report` and `drop_sites` tell about the last run.
"""

from . import activation, attention, gemm, loss, moe, norm, optimizer, quantize, rope
from ._build_info import info
from ._checks import ArgumentError
from ._emulation import KernelError, bank_report, bank_sites, drop_sites, emulation, last_statistics
from ._registry import BackendError, backend, runs_reference
from ._version import __version__

__all__ = [
    "ArgumentError",
    "BackendError",
    "KernelError",
    "__version__",
    "activation",
    "attention",
    "backend",
    "bank_report",
    "bank_sites",
    "drop_sites",
    "emulation",
    "gemm",
    "info",
    "last_statistics",
    "loss",
    "moe",
    "norm",
    "optimizer",
    "quantize",
    "rope",
    "runs_reference",
]
