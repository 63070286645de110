"""Timing on a GPU: cold L2, interleaved candidates, percentiles, clocks and power during a sustained second.

Cold: before each call a buffer larger than L2 is written, which also keeps the GPU busy while the host queues the
call, so that the events around it measure the GPU alone. Candidates take turns, so that drift hits all of them.
Sustained: the same call back to back for about a second, which is what the power limit allows; use random data.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .device import Device

REPEATS = 30
FLUSH_BYTES = 512 << 20  # several times the L2 of any Hopper


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(milliseconds: list[float]) -> dict[str, Any]:
    """median_us, p10_us, p90_us, min_us, repeats."""
    us = [1000 * ms for ms in milliseconds]
    return {
        "median_us": round(percentile(us, 0.5), 3),
        "p10_us": round(percentile(us, 0.1), 3),
        "p90_us": round(percentile(us, 0.9), 3),
        "min_us": round(min(us), 3),
        "repeats": len(us),
    }


class ClockLog:
    """Samples clocks and power in a thread; `summary` gives min, median and max of each."""

    def __init__(self, read: Callable[[], dict[str, float]], interval_s: float = 0.05) -> None:
        self._read, self._interval = read, interval_s
        self.samples: list[dict[str, float]] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        stop = threading.Event()

        def sample() -> None:
            while True:
                got = self._read()
                if got:
                    self.samples.append(got)
                if stop.wait(self._interval):
                    return

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=30)

    def summary(self) -> dict[str, Any]:
        """{"sm_mhz": {"min", "median", "max"}, ...} and the number of samples."""
        result: dict[str, Any] = {"samples": len(self.samples)}
        for key in ("sm_mhz", "memory_mhz", "power_w", "temperature_c"):
            values = [sample[key] for sample in self.samples if key in sample]
            if values:
                result[key] = {"min": min(values), "median": percentile(values, 0.5), "max": max(values)}
        return result


def clock_reader() -> Callable[[], dict[str, float]]:
    """NVML where its Python module is installed (fast), nvidia-smi otherwise."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    except Exception:  # noqa: BLE001  NVML raises types of its own; without it there is nvidia-smi
        return Device().clocks

    def read() -> dict[str, float]:
        try:
            return {
                "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
                "memory_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
                "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                "temperature_c": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            }
        except Exception:  # noqa: BLE001  a sample that is missing must not end a measurement
            return {}

    return read


def compare(
    candidates: dict[str, Callable[[], Any]], repeats: int = REPEATS, sustained_s: float = 0.7
) -> dict[str, dict[str, Any]]:
    """Time candidates in turns. One that raises is `absent` with its reason; the others go on."""
    import torch

    results: dict[str, dict[str, Any]] = {}
    working: dict[str, Callable[[], Any]] = {}
    for name, call in candidates.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            working[name] = call
        except Exception as error:  # noqa: BLE001  whatever keeps a baseline from running is its reason
            results[name] = {
                "absent": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
            }
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in working}
    for _ in range(repeats):
        for name, call in working.items():
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    del flush
    read = clock_reader()
    for name, call in working.items():
        results[name] = summarise([begin.elapsed_time(end) for begin, end in events[name]])
        if sustained_s > 0:
            results[name]["sustained"] = sustained(call, sustained_s, results[name]["median_us"], read)
    return {name: results[name] for name in candidates}


def sustained(
    call: Callable[[], Any], seconds: float, guess_us: float, read: Callable[[], dict[str, float]]
) -> dict[str, Any]:
    """Back to back for about `seconds`: microseconds a call over the second half, and the clocks meanwhile."""
    import torch

    log = ClockLog(read)
    batch = max(1, int(0.1 * 1e6 / max(guess_us, 1.0)))  # about a tenth of a second
    times: list[float] = []
    with log():
        finish = time.monotonic() + seconds
        while time.monotonic() < finish or len(times) < 2:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(batch):
                call()
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end) / batch)
    late = times[len(times) // 2 :]
    return {"mean_us": round(sum(late) / len(late), 3), "calls": batch * len(times), **log.summary()}
