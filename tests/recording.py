"""Which ops ran where: what a test asks that says "all of this runs on kernels"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from deepseek_ops import _registry

# Ops without kernels (README). With `deepseek_ops.backend("checked", "modelled")` they run in the midst of the kernels.
WITHOUT_KERNELS = frozenset(
    ("mla_attention", "mla_attention_backward", "mla_decode", "lse_merge", "cache_write_", "rope")
)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Backend -> names of the ops that ran on it inside the block."""
    ran: dict[str, set[str]] = {}
    call = _registry.Op._call

    def note(op, backend, *args):
        ran.setdefault(backend, set()).add(op.name)
        return call(op, backend, *args)

    _registry.Op._call = note
    try:
        yield ran
    finally:
        _registry.Op._call = call
