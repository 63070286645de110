"""FP8 copies of master weights, refreshed once per optimizer step (report 3.3.1: masters stay in FP32).

When a copy is made anew: at the first use after the master changed. "Changed" is the tensor's version counter, which every
update in place bumps (optimizers, `load_state_dict`, our own kernels), or another storage (a move, a cast, a swap by
assignment). So gradient accumulation over any number of micro-batches quantises once, and so does evaluation between two steps.

Or by the optimizer's step itself, which has the new master in its registers and so saves reading it again: a trainer that
wants this asks for it, with `stepping` around `adamw_`. It is not a hook on the optimizer, since only the trainer knows which
tensors are masters of which module; whatever else changes a master afterwards (an average swapped in, a checkpoint loaded) is
seen by the version counter as ever. Bits are the same either way.

What cannot be seen must not be guessed:

- A backward pass whose copies were refreshed after its forward pass raises autograd's own error, as `nn.Linear` would:
  copies are refreshed in place and saved with the graph.
- A master made in inference mode has no version counter: `StaleWeightError`.
- A CUDA graph replays kernels, not this check. Capturing raises `StaleWeightError` unless the copies are fresh; call
  `refresh_weights` before the capture and, outside the graph, after every step. The copies never move.
- Writing through `master.data` or through memory that the master merely points into bumps nothing. Nobody can see that
  without reading the weight; `with verify_weights():` does read it, at every use, and raises `StaleWeightError`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..quantize import quantize_128x128, transpose_128x128

_verifying = contextvars.ContextVar("deepseek_ops_verify_weights", default=False)


class StaleWeightError(RuntimeError):
    """FP8 copies of a weight do not, or may not, hold its present value; the message says why and what to do."""


class Fp8Weight(NamedTuple):
    """E4M3 copies of a weight [N, K] (or [G, N, K]) with one scale per 128 x 128 block.

    `q`, `scale` feed Fprop; `q_t`, `scale_t` are the exact transpose, fed to Dgrad (None where nobody asked for it).
    """

    q: Tensor
    scale: Tensor
    q_t: Tensor | None
    scale_t: Tensor | None


class Fp8WeightCache:
    """The FP8 copies of one master; `refreshes` counts how often they were made. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        self.refreshes = 0
        self._seen: tuple[StorageWeakRef, int] | None = None
        self._fprop: tuple[Tensor, Tensor] | None = None
        self._dgrad: tuple[Tensor, Tensor] | None = None
        self._turned = False  # whether `_dgrad` is the transpose of the present `_fprop`

    def __reduce__(self) -> tuple[Any, ...]:
        return Fp8WeightCache, ()

    def __call__(self, master: Tensor, *, transposed: bool = True) -> Fp8Weight:
        """The copies of `master`, made now if it changed. transposed: also what Dgrad needs."""
        # Normal tensors whatever the mode of the caller: evaluation in inference mode may come before training.
        with torch.inference_mode(False), torch.no_grad():
            self._refresh(master)
            assert self._fprop is not None
            if not transposed:
                return Fp8Weight(*self._fprop, None, None)
            if not self._turned:
                self._dgrad = _into(self._dgrad, transpose_128x128(*self._fprop))
                self._turned = True
            assert self._dgrad is not None
            return Fp8Weight(*self._fprop, *self._dgrad)

    def invalidate(self) -> None:
        """Quantise at the next use, whatever the version counter says."""
        self._seen = None

    def writable(self, master: Tensor) -> Fp8Weight | None:
        """The copies' memory, for a kernel that writes the copies of `master`; None before the first use, or if it differs."""
        if self._fprop is None or master.dtype != torch.float32 or master.is_inference():
            return None
        like, turned = master.detach(), master.detach().mT
        if not _alike(self._fprop[0], like):
            return None
        return Fp8Weight(
            *self._fprop, *(self._dgrad if self._dgrad and _alike(self._dgrad[0], turned) else (None, None))
        )

    def written(self, master: Tensor, copies: Fp8Weight) -> None:
        """Take note that `copies`, which `writable` gave, hold the present value of `master`."""
        self._turned = copies.q_t is not None
        self._note(master)

    def _note(self, master: Tensor) -> None:
        # A weak reference keeps the storage's address from being given to another one, and no memory.
        self._seen = StorageWeakRef(master.untyped_storage()), master._version
        self.refreshes += 1

    def _refresh(self, master: Tensor) -> None:
        if master.is_inference():
            raise StaleWeightError(
                "weight: was made in inference mode, where changes cannot be seen; build and load the module outside "
                "torch.inference_mode(), and evaluate inside it"
            )
        if self._fits(master):
            if _verifying.get():
                self._verify(master)
            return
        if master.is_cuda and torch.cuda.is_current_stream_capturing():
            raise StaleWeightError(
                "weight: changed since its FP8 copies were made, and a CUDA graph would not notice the next change; call "
                "deepseek_ops.nn.refresh_weights(module) before the capture and after every optimizer step"
            )
        self._fprop = _into(self._fprop, quantize_128x128(master.detach()))
        self._turned = False
        self._note(master)

    def _fits(self, master: Tensor) -> bool:
        if self._seen is None:
            return False
        storage, version = self._seen
        return storage.cdata == master.untyped_storage()._cdata and version == master._version

    def _verify(self, master: Tensor) -> None:
        assert self._fprop is not None
        q, scale = quantize_128x128(master.detach())
        if not (_same_bytes(q, self._fprop[0]) and torch.equal(scale, self._fprop[1])):
            raise StaleWeightError(
                "weight: its values changed, its version counter did not: something writes through `.data` or through "
                "memory that the parameter points into; write through the parameter, or call "
                "deepseek_ops.nn.refresh_weights(module, force=True) after each step"
            )


@contextlib.contextmanager
def verify_weights() -> Iterator[None]:
    """Inside the block every use of FP8 copies compares them with their master (slow; waits for the device)."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


def refresh_weights(module: nn.Module, *, force: bool = False) -> int:
    """Make the FP8 copies of every weight in `module` that changed; returns how many were made.

    Never needed in ordinary training, where the first use does it. With CUDA graphs: before the capture and after each
    step. force: of every weight, for trainers that write where the version counter cannot see.
    """
    made = 0
    for part in module.modules():
        for name, cache in getattr(part, "weight_caches", {}).items():
            before = cache.refreshes
            if force:
                cache.invalidate()
            cache(getattr(part, name))
            made += cache.refreshes - before
    return made


def caches_of(module: nn.Module) -> dict[str, Fp8WeightCache]:
    """The caches in `module` by the qualified names of their masters, as `named_parameters` has them."""
    return {
        f"{prefix}.{name}" if prefix else name: cache
        for prefix, part in module.named_modules()
        for name, cache in getattr(part, "weight_caches", {}).items()
    }


@contextlib.contextmanager
def stepping(
    masters: Sequence[Tensor], caches: Sequence[Fp8WeightCache | None]
) -> Iterator[list[Fp8Weight | None]]:
    """Around one `adamw_` of `masters`, whose `fp8_out` it gives: the step makes the copies that `caches` hold.

    None stands for a tensor without a cache. Copies that were never used have no memory yet and are made at the first use.
    A step that fails leaves the copies to the next use.
    """
    copies = [
        None if cache is None else cache.writable(master)
        for master, cache in zip(masters, caches, strict=True)
    ]
    try:
        yield copies
    except BaseException:
        for cache, written in zip(caches, copies, strict=True):
            if cache and written:
                cache.invalidate()
        raise
    for master, cache, written in zip(masters, caches, copies, strict=True):
        if cache and written:
            cache.written(master, written)


def _alike(copy: Tensor, master: Tensor) -> bool:
    return type(copy) is type(master) and copy.shape == master.shape and copy.device == master.device


def _into(old: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`new`, in the memory of `old` where that fits: the copies' addresses are part of captured CUDA graphs."""
    if old is None or any(
        type(a) is not type(b) or a.shape != b.shape or a.device != b.device
        for a, b in zip(old, new, strict=True)
    ):
        return new
    for a, b in zip(old, new, strict=True):
        a.copy_(b)
    return old


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
