"""No wait without a deadline, and an error that says who is missing (report 3.2 says nothing here; users ask for little else).

`Watch` is a board in the job's store. A thread of every rank counts up its beat there and writes what the rank is doing; a rank
that fails writes why. When a collective breaks or its deadline passes, the rank watches the board for a while: a beat that stands
still belongs to a rank that was killed or stopped; a beat that goes on, with another phase beside it, to one that is slow or has
gone another way. Only beats are compared, never clocks, so that a rank whose clock is wrong is not suspected for it.

`Group` is a process group whose collectives go through that: each names its phase, each ends within the timeout, in a
`ParallelError` at worst. On NCCL, where the host does not wait, the deadline is the process group's own watchdog.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore


class ParallelError(RuntimeError):
    """A collective failed. rank: who says so. phase: in what. suspects: ranks that seem to be the cause (may be empty)."""

    def __init__(self, message: str, rank: int, phase: str, suspects: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rank, self.phase, self.suspects = rank, phase, tuple(suspects)

    def __reduce__(self) -> tuple[Any, ...]:
        return ParallelError, (str(self), self.rank, self.phase, self.suspects)


class Watch:
    """This rank's line on the board, and a reading of the others'.

    interval: seconds between two beats. A rank without a beat for `PATIENCE` of them is taken for dead.
    """

    PATIENCE = 10

    def __init__(self, store: Any, rank: int, world: int, interval: float) -> None:
        self.rank, self.world, self.interval = rank, world, interval
        # The beating thread has a connection of its own: a wait in the other one must not stop the beat.
        self._store, self._beats = PrefixStore("watch", store), PrefixStore("watch", store.clone())
        self._lock = threading.Lock()
        self._line: dict[str, Any] = {"beat": 0, "phase": "start", "calls": 0, "end": None, "suspects": []}
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name=f"watch-{rank}", daemon=True)
        self._thread.start()

    @property
    def phase(self) -> str:
        """What this rank is doing."""
        return str(self._line["phase"])

    def enter(self, phase: str) -> None:
        """Note that this rank comes to `phase`; shown with the next beat."""
        self._line["phase"] = phase
        self._line["calls"] += 1

    def close(self, end: str = "left", suspects: Sequence[int] = ()) -> None:
        """Write the last line: why this rank is gone."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._line.update(end=end, suspects=list(suspects))
        with contextlib.suppress(RuntimeError):  # the store may be gone, and then nobody can read it either
            self._beat(self._store)
        self._thread.join(2 * self.interval)

    def failure(self, phase: str, error: BaseException) -> ParallelError:
        """What to raise for `error` in a collective of `phase`, after a look at the others."""
        try:
            lines, moving = self._look()
        except RuntimeError:
            message = (
                f"rank {self.rank}: {phase}: {_first_line(error)}; and the store does not answer: the process that hosts it "
                "(torchrun's agent, else rank 0) is gone"
            )
            return ParallelError(message, self.rank, phase)
        suspects, table = self._judge(lines, moving)
        who = (
            f"rank {', '.join(map(str, suspects))} seems to be the cause"
            if suspects
            else "no rank stands out"
        )
        message = f"rank {self.rank}: {phase}: {_first_line(error)}; {who}\n" + "\n".join(table)
        self.close(f"{phase}: {_first_line(error)}", suspects or [self.rank])
        return ParallelError(message, self.rank, phase, suspects)

    def _look(self) -> tuple[list[dict[str, Any]], list[bool]]:
        """Every rank's line, and whether its beat goes on."""
        keys = [str(rank) for rank in range(self.world)]
        first = self._read(keys)
        for _ in range(self.PATIENCE):
            time.sleep(self.interval)
            lines = self._read(keys)
            moving = [a["beat"] != b["beat"] for a, b in zip(lines, first, strict=True)]
            if all(m or line["end"] is not None for m, line in zip(moving, lines, strict=True)):
                break
        return lines, moving

    def _judge(self, lines: list[dict[str, Any]], moving: list[bool]) -> tuple[list[int], list[str]]:
        dead, failed, elsewhere, table = [], [], [], []
        named: set[int] = set()
        for rank, line in enumerate(lines):
            if rank == self.rank:
                continue
            where = f"{line['phase']} (call {line['calls']})"
            if line["end"] is not None:
                state = f"ended in {where}: {line['end']}"
                if not line["suspects"]:
                    failed.append(rank)
                named.update(s for s in line["suspects"] if s != self.rank)
            elif not moving[rank]:
                state = f"shows no sign of life; was last seen in {where}"
                dead.append(rank)
            else:
                state = f"is alive in {where}"
                if (line["phase"], line["calls"]) != (self._line["phase"], self._line["calls"]):
                    elsewhere.append(rank)
            table.append(f"  rank {rank} {state}")
        named -= {rank for rank, line in enumerate(lines) if line["end"] is not None}
        return dead or failed or sorted(named) or elsewhere, table

    def _read(self, keys: list[str]) -> list[dict[str, Any]]:
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def _beat(self, store: Any = None) -> None:
        with self._lock:
            self._line["beat"] += 1
            (store or self._beats).set(str(self.rank), json.dumps(self._line))

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self._beat()
            except RuntimeError:
                return  # the store is gone; `failure` says so


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
        if self.size == 1:
            return rows
        total = rows.shape[0] if receive is None else sum(receive)
        flat = rows.contiguous().view(rows.shape[0], -1) if rows.numel() else rows.reshape(rows.shape[0], 0)
        sent = flat.view(torch.uint8) if flat.numel() else flat.new_empty(flat.shape, dtype=torch.uint8)
        width = rows.element_size() * rows[0:1].numel() if rows.shape[0] else _row_bytes(rows)
        sent = sent.view(rows.shape[0], width)
        got = sent.new_empty((total, width))
        self._do(
            phase,
            lambda: dist.all_to_all_single(
                got, sent,
                None if receive is None else list(receive), None if send is None else list(send),
                group=self.handle, async_op=True,
            ),
        ).wait()  # fmt: skip
        return got.view(rows.dtype).view(total, *rows.shape[1:])

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
            message = f"rank {self.rank}: {what}: must be the same on all ranks; rank {_names(odd)} differ(s); here {value}"
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
            return ParallelError(f"rank {self.rank}: {phase}: {_first_line(error)}", self.rank, phase)
        return self.watch.failure(phase, error)


def _row_bytes(rows: Tensor) -> int:
    width = rows.element_size()
    for size in rows.shape[1:]:
        width *= size
    return width


def _names(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
