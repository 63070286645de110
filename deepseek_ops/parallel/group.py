"""Process groups whose collectives have a name, a deadline, and an error that says who is missing.

`Group` wraps torch.distributed's: each call names its phase and ends within the timeout, in a `ParallelError` at worst
(`faults`). On NCCL, where the host does not wait, the deadline is that of the process group's own watchdog. Rows travel as
bytes: every dtype on every backend, and several tensors in one message.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .faults import ParallelError, Watch, first_line, names


class Pending:
    """A collective under way; `wait` ends it, within the deadline."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """Wait for it; raises `ParallelError`. A second call does nothing."""
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Group:
    """Some ranks and their collectives. `ranks`: global, in the group's order; `index`: this rank's place among them.

    A group of one rank needs no process group (`Group.alone()`), and its collectives are copies.
    """

    def __init__(
        self, handle: Any, ranks: Sequence[int], rank: int, watch: Watch | None, timeout: float
    ) -> None:
        self.handle, self.ranks, self.rank = handle, tuple(ranks), rank
        self.index, self.size = self.ranks.index(rank), len(self.ranks)
        self.watch, self.timeout = watch, timeout

    @classmethod
    def alone(cls, rank: int = 0, watch: Watch | None = None) -> Group:
        """The group of one rank."""
        return cls(None, (rank,), rank, watch, 0.0)

    def all_to_all(
        self,
        rows: Tensor,
        send: Sequence[int] | None = None,
        receive: Sequence[int] | None = None,
        *,
        phase: str,
    ) -> Tensor:
        """Rows [sum(send), ...] to the ranks in group order, send[i] of them to the i-th -> rows [sum(receive), ...].

        Without counts the rows are cut into `size` equal parts.
        """
        got, pending = self.start_all_to_all(rows, send, receive, phase=phase)
        pending.wait()
        return got

    def start_all_to_all(
        self,
        rows: Tensor,
        send: Sequence[int] | None = None,
        receive: Sequence[int] | None = None,
        *,
        phase: str,
    ) -> tuple[Tensor, Pending]:
        """`all_to_all` not yet waited for: the rows are there once `wait` of the second result returns."""
        if self.size == 1:
            return rows, Pending()
        total = rows.shape[0] if receive is None else sum(receive)
        sent = as_bytes(rows)
        got = sent.new_empty((total, sent.shape[1]))
        splits = None if receive is None else list(receive), None if send is None else list(send)
        pending = self._do(
            phase,
            lambda: dist.all_to_all_single(got, sent, *splits, group=self.handle, async_op=True),
        )
        return from_bytes(got, rows.dtype, rows.shape[1:]), pending

    def all_gather(self, part: Tensor, *, phase: str) -> Tensor:
        """Equal parts [n, ...] of all ranks -> [size * n, ...], in group order."""
        out = part.new_empty((self.size * part.shape[0], *part.shape[1:]))
        self.all_gather_into(out, part, phase=phase).wait()
        return out

    def all_gather_into(self, out: Tensor, part: Tensor, *, phase: str) -> Pending:
        """`all_gather` into memory that is there, not yet waited for; `part` must stay as it is until then."""
        if self.size == 1:
            out.copy_(part)
            return Pending()
        views = [view.view(torch.uint8) for view in out.view(self.size, -1).unbind()]
        part_bytes = part.contiguous().view(-1).view(torch.uint8)
        return self._do(phase, lambda: dist.all_gather(views, part_bytes, group=self.handle, async_op=True))

    def all_reduce_(self, tensor: Tensor, *, phase: str) -> Tensor:
        """Sum over ranks, in place and in the backend's order (exact for integers); returns the tensor."""
        if self.size > 1:
            self._do(phase, lambda: dist.all_reduce(tensor, group=self.handle, async_op=True)).wait()
        return tensor

    def send(self, tensor: Tensor, to: int, tag: int, *, phase: str) -> Pending:
        """Send to the rank at index `to`; `tensor` must stay as it is until the wait. Gloo only: NCCL has no tags."""
        at = self.ranks[to]
        return self._do(phase, lambda: dist.isend(tensor, at, group=self.handle, tag=tag))

    def receive_into(self, out: Tensor, source: int, tag: int, *, phase: str) -> Pending:
        """Receive what the rank at index `source` sends with this tag, in its order; same size on both ends."""
        at = self.ranks[source]
        return self._do(phase, lambda: dist.irecv(out, at, group=self.handle, tag=tag))

    def barrier(self, *, phase: str) -> None:
        """Everybody is here. Also a check that everybody lives."""
        device = "cuda" if self._on_cuda() else "cpu"
        self.all_reduce_(torch.zeros(1, dtype=torch.int64, device=device), phase=phase)

    def agree(self, what: str, value: Any) -> None:
        """Raise on every rank unless `value` (JSON-like) is the same on all: two programs that differ would hang later."""
        text = json.dumps(value, sort_keys=True, default=str).encode()
        mine = torch.frombuffer(bytearray(hashlib.blake2b(text, digest_size=16).digest()), dtype=torch.uint8)
        mine = mine.cuda() if self._on_cuda() else mine
        digests = self.all_gather(mine, phase=f"comparing {what}").view(self.size, -1).tolist()
        usual = max(digests, key=digests.count)
        odd = [rank for rank, digest in zip(self.ranks, digests, strict=True) if digest != usual]
        if odd:
            message = f"rank {self.rank}: {what}: must be the same on all ranks; rank {names(odd)} differ(s); here {value}"
            raise ParallelError(message, self.rank, f"comparing {what}", odd)

    def _on_cuda(self) -> bool:
        return self.handle is not None and dist.get_backend(self.handle) == "nccl"

    def _do(self, phase: str, start: Callable[[], Any]) -> Pending:
        if self.watch is not None:
            self.watch.enter(phase)
        try:
            work = start()
        except RuntimeError as error:
            raise self._failure(phase, error) from error

        def finish() -> None:
            try:
                if self._on_cuda():
                    work.wait()  # the stream waits; the host goes on
                else:
                    work.wait(timedelta(seconds=self.timeout))
            except RuntimeError as error:
                raise self._failure(phase, error) from error

        return Pending(finish)

    def _failure(self, phase: str, error: RuntimeError) -> ParallelError:
        if self.watch is None:
            return ParallelError(f"rank {self.rank}: {phase}: {first_line(error)}", self.rank, phase)
        return self.watch.failure(phase, error)


def as_bytes(rows: Tensor) -> Tensor:
    """[N, ...] -> uint8 [N, bytes of a row]."""
    width = rows.element_size()
    for size in rows.shape[1:]:
        width *= size
    if rows.shape[0] * width == 0:
        return torch.empty((rows.shape[0], width), dtype=torch.uint8, device=rows.device)
    return rows.reshape(rows.shape[0], -1).view(torch.uint8).contiguous()


def from_bytes(data: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """What `as_bytes` made of rows [N, *shape] of dtype."""
    return data.contiguous().view(dtype).view(data.shape[0], *shape)
