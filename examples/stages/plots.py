"""The pictures of a run: each function draws one PNG from numbers, and knows nothing of the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt

BAND = 0.25  # percent: the report's bound on the relative loss error of FP8 training (section 3.3)


def smooth(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average without start-up bias; the report smooths its FP8 curves with 0.9."""
    out, average, weight = [], 0.0, 0.0
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        out.append(average / weight)
    return out


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def loss_curves(
    path: Path,
    tokens: Sequence[float],
    train: Sequence[float],
    mtp: Sequence[float],
    held_out: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Training loss and MTP loss (smoothed), and held-out loss of each source at the evaluation points."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    axes[0].plot(tokens, train, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes[0].plot(tokens, smooth(train), color="tab:blue", label="next token")
    axes[0].plot(tokens, smooth(mtp), color="tab:orange", label="token after it (MTP)")
    axes[0].set(title="training", xlabel="tokens", ylabel="nats per token")
    for source, (at, values) in held_out.items():
        axes[1].plot(at, values, marker="o", markersize=3, label=source)
    axes[1].set(title="held-out, by source", xlabel="tokens")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _save(figure, path)


def expert_load(
    path: Path,
    loads: Mapping[str, Sequence[Sequence[float]]],
    violations: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Heat maps of expert load per layer (1 = perfectly even) and MaxVio over training, one column per run."""
    figure, axes = plt.subplots(1, len(loads) + 1, figsize=(4.5 * (len(loads) + 1), 3.4))
    top = max(2.0, *(max(map(max, load)) for load in loads.values()))
    for axis, (name, load) in zip(axes, loads.items(), strict=False):
        image = axis.imshow(load, aspect="auto", vmin=0, vmax=top, cmap="magma")
        axis.set(title=f"held-out expert load, {name}", xlabel="expert", ylabel="MoE layer")
        axis.set_yticks(range(len(load)))
        figure.colorbar(image, ax=axis, shrink=0.8, label="load / mean")
    for name, (tokens, values) in violations.items():
        axes[-1].plot(tokens, smooth(values), label=name)
    axes[-1].axhline(0.5, color="gray", linestyle=":", linewidth=1)
    axes[-1].set(title="MaxVio = max load / mean - 1", xlabel="tokens", ylim=(0, None))
    axes[-1].grid(alpha=0.3)
    axes[-1].legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)


def fp8_gap(
    path: Path, tokens: Sequence[float], high: Sequence[float], fp8: Sequence[float], high_name: str
) -> None:
    """Smoothed losses of the twins and their relative gap with the report's 0.25 % band."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    axes[0].plot(tokens, smooth(high), label=high_name)
    axes[0].plot(tokens, smooth(fp8), label="FP8", linestyle="--")
    axes[0].set(title="training loss, EMA 0.9", xlabel="tokens", ylabel="nats per token")
    axes[0].legend(fontsize=8)
    axes[1].axhspan(-BAND, BAND, color="tab:green", alpha=0.15, label=f"±{BAND} %")
    axes[1].plot(tokens, gap_percent(high, fp8), color="tab:red")
    axes[1].set(
        title=f"FP8 loss relative to {high_name}", xlabel="tokens", ylabel="percent", ylim=(-1.5, 1.5)
    )
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    _save(figure, path)


def gap_percent(high: Sequence[float], fp8: Sequence[float]) -> list[float]:
    """Relative difference of the smoothed curves in percent, point by point."""
    return [100 * (b / a - 1) for a, b in zip(smooth(high), smooth(fp8), strict=True)]
