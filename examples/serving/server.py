"""uvicorn's server with a phase before its end: it still answers, but takes nothing new."""

from __future__ import annotations

import asyncio
import time
from types import FrameType

import uvicorn

from examples.serving.app import Service


class GracefulServer(uvicorn.Server):
    """The first SIGTERM or Ctrl-C: new requests get 503, those under way have `drain` seconds, then they are cut and say
    so, and the server ends. A second one ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service, drain: float) -> None:
        super().__init__(config)
        self.service, self.drain = service, drain
        self.loop: asyncio.AbstractEventLoop | None = None
        self.draining: asyncio.Task[None] | None = None

    async def startup(self, *args: object, **options: object) -> None:
        """As uvicorn's; remembers the loop for `handle_exit`."""
        self.loop = asyncio.get_running_loop()
        await super().startup(*args, **options)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.loop is None or self.service.draining:
            self.should_exit = self.force_exit = True
            return
        self.service.draining = True
        self.loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self.draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        print(f"stopping: {self.service.active} responses under way", flush=True)
        await self._idle(self.drain)
        await asyncio.to_thread(self.service.worker.stop, "the server is shutting down")
        await self._idle(2.0)  # those that were cut still say so
        self.should_exit = True

    async def _idle(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.service.active and time.monotonic() < end:
            await asyncio.sleep(0.02)
