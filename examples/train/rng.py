"""The state of every global random number generator, as JSON, for exact resumption."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_rng(seed: int) -> None:
    """Start every global generator from `seed`, so that equal runs stay equal whatever uses them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def capture_rng() -> dict[str, Any]:
    """State of torch (CPU and every CUDA device), numpy's legacy generator and Python's `random`, as JSON."""
    name, words, position, has_gauss, gauss = np.random.get_state()
    version, state, next_gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": [_hex(t) for t in cuda],
        "numpy": [str(name), [int(w) for w in words], int(position), int(has_gauss), float(gauss)],
        "python": [version, list(state), next_gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Continue from `capture_rng()`. States of CUDA devices that are not here are ignored."""
    torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available():
        for device, text in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(_tensor(text), device)
    name, words, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))


def _hex(tensor: torch.Tensor) -> str:
    return tensor.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
