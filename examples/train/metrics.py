"""What a run says about itself: one JSON object per line on disk, one readable line on the terminal.

The file is appended to with one write per line, so a kill can tear at most the last line, which readers and the next
writer drop. Resuming from a checkpoint removes the lines of the steps that will be run again, so that a resumed run
leaves the same file as one that was never interrupted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from examples.data.files import disk_errors, write_atomic
from examples.errors import UserError


class MetricsWriter:
    """Append metrics to a JSONL file, and to TensorBoard when a folder is given and it is installed.

    path:        the JSONL file; its folder is created. An existing file is continued.
    after_step:  the step of the checkpoint that training resumes from: lines with a larger "step" are removed first,
                 atomically. None keeps every complete line.
    tensorboard: folder for the mirror; ignored if TensorBoard is not installed.
    """

    def __init__(self, path: Path, *, after_step: int | None = None, tensorboard: Path | None = None) -> None:
        self.path = Path(path)
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _keep_lines(self.path, after_step)
        with disk_errors(self.path):
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._mirror = None if tensorboard is None else _open_tensorboard(tensorboard, after_step)

    def write(self, step: int, **values: Any) -> None:
        """Write one line ``{"step": step, ...}``.

        Values are numbers, strings, lists and dicts of them, or tensors (which are read, a synchronisation on CUDA). NaN and
        infinities become null, because JSON has no word for them.
        """
        record = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with disk_errors(self.path):
            written = os.write(self._file, line)
            if written != len(line):  # a full disk takes what fits; do not leave half a line behind
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._mirror is not None:
            for name, value in values.items():
                number = _plain(value)
                if isinstance(number, (int, float)):
                    self._mirror.add_scalar(name, number, step)

    def close(self) -> None:
        """Flush to the disk and close; writing afterwards is an error."""
        if self._file >= 0:
            with disk_errors(self.path):
                os.fsync(self._file)
            os.close(self._file)
            self._file = -1
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> MetricsWriter:  # noqa: PYI034 (typing.Self is newer than Python 3.10)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics file; a torn last line is left out, other damage is a `UserError`."""
    return [record for _, record in _parse(Path(path))]


class Progress:
    """The line on the terminal: step, loss, tokens per second, time left, MaxVio, peak memory.

    total_tokens: end of the run. done_tokens: where it starts (after a resume), for rate and time left.
    every:        seconds between lines; the first update and the last token always print.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        done_tokens: int = 0,
        every: float = 5.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_tokens = total_tokens
        self._every, self._stream, self._clock = every, stream, clock
        self._tokens, self._time = done_tokens, clock()
        self._rate: float | None = None
        self._printed = -math.inf

    def update(
        self,
        step: int,
        tokens: int,
        loss: float | torch.Tensor,
        *,
        max_violation: float | torch.Tensor | None = None,
    ) -> str | None:
        """Print a line if one is due and return it. Tensors are read (synchronised) only then.

        tokens: consumed so far. max_violation: load of the busiest expert over the mean, minus 1.
        """
        now = self._clock()
        if now - self._printed < self._every and tokens < self.total_tokens:
            return None
        if now > self._time and tokens > self._tokens:
            rate = (tokens - self._tokens) / (now - self._time)
            self._rate = rate if self._rate is None else 0.7 * self._rate + 0.3 * rate
        self._tokens, self._time, self._printed = tokens, now, now
        parts = [f"step {step:>6}", f"loss {float(loss):7.4f}", f"{tokens / self.total_tokens:6.1%}"]
        if self._rate:
            left = max(0, self.total_tokens - tokens) / self._rate
            parts += [f"{_si(self._rate)} tok/s", f"ETA {_duration(left)}"]
        if max_violation is not None:
            parts.append(f"MaxVio {float(max_violation):.2f}")
        parts.append(f"peak {peak_memory_bytes() / 2**30:.2f} GiB")
        line = "  ".join(parts)
        print(line, file=self._stream or sys.stdout, flush=True)
        return line


def peak_memory_bytes() -> int:
    """Most memory this run held: of the CUDA allocator if one is in use, otherwise of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    number = float(value)  # also numpy's scalars
    return number if math.isfinite(number) else None


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    with disk_errors(path, "reading"):
        *lines, torn = path.read_bytes().split(b"\n")
    if torn:  # complete lines end in a newline; keep the last one if only that is missing
        lines.append(torn)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not a metrics line")  # noqa: TRY004
        except ValueError as error:
            if torn and number == len(lines):
                break
            raise UserError(
                f"{path}: line {number} is damaged ({error}); delete the line to go on"
            ) from error
        records.append((line, record))
    return records


def _keep_lines(path: Path, after_step: int | None) -> None:
    kept = [line for line, r in _parse(path) if after_step is None or r["step"] <= after_step]
    content = b"".join(line + b"\n" for line in kept)
    if path.stat().st_size != len(content):
        write_atomic(path, content)


def _open_tensorboard(folder: Path, after_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=None if after_step is None else after_step + 1)


def _si(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    return f"{h}h{m:02}m" if h else f"{m}m{s:02}s" if m else f"{s}s"
