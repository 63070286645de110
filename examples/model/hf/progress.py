"""Lines about bytes: how many, how fast, how long still."""

from __future__ import annotations

import time

EVERY_SECONDS = 5.0


class ByteProgress:
    """Prints a line every some seconds while bytes go by, and one at the end."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.quiet = total, quiet
        self.done = self._skipped = 0
        self._what = ""
        self._start = self._last = time.monotonic()

    def skip(self, count: int, files: int) -> None:
        """Bytes that an interrupted call wrote."""
        self.done += count
        self._skipped += count
        self._say(f"continuing: {files} finished shard{'s' if files > 1 else ''}, {_size(count)}")

    def start(self, what: str) -> None:
        """What the next bytes belong to."""
        self._what = what

    def add(self, count: int) -> None:
        """More bytes are written."""
        self.done += count
        now = time.monotonic()
        if now - self._last >= EVERY_SECONDS:
            self._last = now
            rate = (self.done - self._skipped) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / max(rate, 1.0)
            self._say(
                f"{self._what}: {_size(self.done)} of {_size(self.total)} "
                f"({self.done / max(self.total, 1):.0%}), {_size(rate)}/s, {_duration(left)} left"
            )

    def finish(self) -> None:
        """All is written."""
        seconds = time.monotonic() - self._start
        new = self.done - self._skipped
        self._say(f"wrote {_size(new)} in {seconds:.1f} s ({_size(new / max(seconds, 1e-9))}/s)")

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(f"  {line}", flush=True)


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
