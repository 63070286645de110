"""Figure 6 of the report by other code: fp64 values of quantised tensors, tile by tile, in plain loops."""

from __future__ import annotations

import math

import torch


def quantised(x, tile, *, pow2):
    """fp64 values of x after E4M3 with one scale per `tile` = (rows, columns)."""
    out = torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], tile[0]):
        for j in range(0, x.shape[1], tile[1]):
            part = x[i : i + tile[0], j : j + tile[1]].float()
            amax = part.abs().max()
            if amax == 0:
                out[i : i + tile[0], j : j + tile[1]] = 0
                continue
            # The multiplier is an fp32 number of its own, 448 / amax: bf16 inputs meet ties often enough to see it.
            scale = 2.0 ** math.ceil(math.log2(amax / 448)) if pow2 else float(amax / 448)
            multiplier = 1 / scale if pow2 else torch.tensor(448.0) / amax  # a plain 448 / amax rounds twice
            q = (part * multiplier).clamp(-448, 448).to(torch.float8_e4m3fn)
            out[i : i + tile[0], j : j + tile[1]] = q.double() * scale
    return out


def cached(x):
    """What FP8 modules keep of their input: 1x128 tiles, power-of-two scales."""
    return quantised(x, (1, 128), pow2=True)


def turned(values):
    """Values in 1x128 tiles after the turn to 128x1 tiles, power-of-two scales."""
    return quantised(values, (128, 1), pow2=True)


def e5m6(x):
    """fp64 values of x in 1x128 tiles of E5M6 with power-of-two scales: 6 mantissa bits, no subnormals needed here."""
    out = torch.empty_like(x, dtype=torch.float64)
    for j in range(0, x.shape[1], 128):
        tile = x[:, j : j + 128].double()
        scale = 2.0 ** torch.ceil(torch.log2(tile.abs().amax(1, keepdim=True) / 65024))
        fraction, exponent = torch.frexp(tile / scale)
        out[:, j : j + 128] = torch.ldexp((fraction * 128).round() / 128, exponent) * scale
    return out


def swiglu(hidden, weight=None):
    """fp64 SwiGLU, differentiable."""
    gate, up = hidden.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    return out if weight is None else out * weight[:, None]


def relative_rms(actual, expected):
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


def kept_bytes(run, exclude=()):
    """(result of `run`, bytes that autograd keeps of it, by storage, without the storages of `exclude`)."""
    left_out = {t.untyped_storage().data_ptr() for t in exclude if t is not None}
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    return result, sum(size for pointer, size in kept.items() if pointer not in left_out)
