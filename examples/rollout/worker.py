"""A thread that drives an engine while others submit to it and wait."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator

from examples.rollout.engine import Engine
from examples.rollout.request import Chunk, Request


class Worker(threading.Thread):
    """Runs passes as long as there is work, and sleeps otherwise. Stop it with `stop`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine", daemon=True)
        self.engine = engine
        self.broken = ""  # what a pass raised; then the engine is closed

    def run(self) -> None:
        """Until `stop`, or until a pass raises: then every request ends with the error and none is taken any more."""
        engine = self.engine
        try:
            while not self._finished():
                engine.step()
        except Exception as error:  # noqa: BLE001  whatever it is, nobody may wait for ever
            traceback.print_exc()
            self.broken = f"{type(error).__name__}: {error}"
            with engine.wake:
                engine.closed = f"a pass failed ({self.broken})"
        engine.fail(engine.closed)

    def stop(self, message: str) -> None:
        """Take no more requests and end those that are left, unfinished, with `message`; waits for the thread."""
        with self.engine.wake:
            self.engine.closed = self.engine.closed or message
            self.engine.wake.notify_all()
        self.join()

    def _finished(self) -> bool:
        """Sleep until there is something to do; whether that is to end."""
        engine = self.engine
        with engine.wake:
            while not (engine.closed or engine.waiting or engine.running):
                engine.wake.wait()
            return bool(engine.closed)

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The request's chunks as they come; leaving the loop early cancels the request."""
        try:
            while True:
                request.ready.wait()
                if (chunk := request.take()) is not None:
                    yield chunk
                    if chunk.finish is not None:
                        return
        finally:
            if request.finish is None:
                self.engine.cancel(request)
