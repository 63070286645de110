"""What is installed here, which backends are present, and why the others are not."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _registry
from ._version import __version__


def info() -> dict[str, Any]:
    """Versions, devices, and every backend with the reason when it is absent.

    Returns a JSON-able dict: ``versions`` (name -> version), ``device`` (text), ``backends``
    (name -> "present (N ops)" or "absent: reason"), ``ops`` (the declared op names).
    """
    backends = {}
    for name in _registry.BACKENDS:
        reason = _registry.absent_reason(name)
        count = sum(name in op.kernels for op in _registry.OPS.values())
        backends[name] = f"absent: {reason}" if reason else f"present ({count} of {len(_registry.OPS)} ops)"
    return {
        "versions": {
            "deepseek_ops": __version__,
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda or "none",
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {platform.machine()}",
        "backends": backends,
        "ops": sorted(_registry.OPS),
    }


def report() -> str:
    """`info` as text for people."""
    data = info()
    lines = [f"{name:14} {version}" for name, version in data["versions"].items()]
    lines.append(f"{'device':14} {data['device']}")
    lines += [f"{'backend':14} {name:9} {state}" for name, state in data["backends"].items()]
    return "\n".join(lines)
