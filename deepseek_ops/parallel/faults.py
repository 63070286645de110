"""No wait without a deadline, and an error that says who is missing (report 3.2 says nothing here; users ask for little else).

`Watch` is a board in the job's store. A thread of every rank counts up its beat there and writes what the rank is doing; a rank
that fails writes why. When a collective breaks or its deadline passes, the rank watches the board for a while: a beat that stands
still belongs to a rank that was killed or stopped; a beat that goes on, with another phase beside it, to one that is slow or has
gone another way. Only beats are compared, never clocks, so that a rank whose clock is wrong is not suspected for it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch._C._distributed_c10d import PrefixStore


class ParallelError(RuntimeError):
    """A collective failed. rank: who says so. phase: in what. suspects: ranks that seem to be the cause (may be empty)."""

    def __init__(self, message: str, rank: int, phase: str, suspects: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rank, self.phase, self.suspects = rank, phase, tuple(suspects)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rank, self.phase, self.suspects)


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
                f"rank {self.rank}: {phase}: {first_line(error)}; and the store does not answer: the process that hosts it "
                "(torchrun's agent, else rank 0) is gone"
            )
            return ParallelError(message, self.rank, phase)
        suspects, table = self._judge(lines, moving)
        who = (
            f"rank {', '.join(map(str, suspects))} seems to be the cause"
            if suspects
            else "no rank stands out"
        )
        message = f"rank {self.rank}: {phase}: {first_line(error)}; {who}\n" + "\n".join(table)
        self.close(f"{phase}: {first_line(error)}", suspects or [self.rank])
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


def names(ranks: Iterable[int]) -> str:
    """1, 2, 3."""
    return ", ".join(map(str, ranks))


def first_line(error: BaseException) -> str:
    """What torch says, without its stack."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
