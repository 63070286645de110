"""Recomputation of cheap tensors in backward, and nothing else (report section 3.2.3).

The report recomputes all RMSNorms and the MLA up-projections, and the output of SwiGLU (section 3.3.3). Generic
checkpointing reruns whole functions: attention and routing would run twice, and the router would count its tokens twice.
Here the tensors themselves are dropped. While `dropping(outputs, rerun)` is active, whatever autograd wants to keep of
`outputs` (the tensor or any view of it) is replaced by a note; backward reads the note, calls `rerun` once, and takes
the view from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class _Note:
    """In place of a saved tensor: which output of which rerun, and how the view lies in it."""

    __slots__ = ("output", "owner", "view")

    def __init__(self, owner: _Rerun, output: int, tensor: torch.Tensor) -> None:
        self.owner, self.output = owner, output
        self.view = (tensor.shape, tensor.stride(), tensor.storage_offset())


class _Rerun:
    """One rerun shared by all notes of a region; its result lives until the last note has been read."""

    def __init__(self, rerun: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        self.rerun = rerun
        self.notes = self.read = 0
        self.outputs: tuple[torch.Tensor, ...] | None = None

    def take(self, note: _Note) -> torch.Tensor:
        if self.outputs is None:
            with torch.no_grad():
                self.outputs = self.rerun()
        tensor = self.outputs[note.output].as_strided(*note.view)
        self.read += 1
        if self.read == self.notes:  # a second backward (retain_graph) simply reruns
            self.outputs, self.read = None, 0
        return tensor


def dropping(
    outputs: tuple[torch.Tensor, ...], rerun: Callable[[], tuple[torch.Tensor, ...]], *, active: bool
) -> contextlib.AbstractContextManager[Any]:
    """A context for the consumers of `outputs`: autograd keeps none of them.

    Args:
        outputs: tensors that `rerun` can make again; each starts its storage.
        rerun: called without gradients, at most once per backward; must return the same values in the same memory
            layout. What it captures stays alive, so it should capture only what backward keeps anyway.
        active: False gives a context that does nothing.
    """
    if not active or not torch.is_grad_enabled():
        return contextlib.nullcontext()
    owner = _Rerun(rerun)
    places = {tensor.untyped_storage().data_ptr(): i for i, tensor in enumerate(outputs)}

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Note:
        output = places.get(tensor.untyped_storage().data_ptr())
        if output is None or not tensor.numel():
            return tensor
        owner.notes += 1
        return _Note(owner, output, tensor)

    def unpack(saved: torch.Tensor | _Note) -> torch.Tensor:
        return saved.owner.take(saved) if isinstance(saved, _Note) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
