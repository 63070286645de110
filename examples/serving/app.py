"""The HTTP application: every limit is checked before work, and no client can hold up another.

a client that         gets / makes happen
asks too much         400, 413 or 429 with Retry-After, naming the field or the limit
sends slowly          408 after `read_seconds`
reads slowly          what has come meanwhile in one event; the engine never waits for it, and its pages are free when its
                      answer ends, read or not. After `write_seconds` without room for a byte its connection ends
vanishes              its requests are cancelled and their pages free before the next pass
comes during shutdown 503
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from examples.data.tokenizer import Tokenizer
from examples.errors import UserError
from examples.rollout.request import Chunk, QueueFull, Request
from examples.rollout.worker import Worker
from examples.serving.protocol import Asked, Limits, choice, envelope, error_body, parse, usage


class Refusal(Exception):
    """An answer other than 200: status, OpenAI's error body, headers."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        super().__init__(body["error"]["message"])
        self.response = JSONResponse(body, status, headers)


class Service:
    """The state behind the routes: a worker's engine, limits, and who is being answered."""

    def __init__(self, worker: Worker, name: str, limits: Limits) -> None:
        assert worker.engine.tokenizer is not None
        self.worker, self.engine, self.name, self.limits = worker, worker.engine, name, limits
        self.tokenizer: Tokenizer = worker.engine.tokenizer
        self.started, self.active, self.draining = int(time.time()), 0, False
        self.statuses: Counter[int] = Counter()
        room = min(self.engine.model.config.max_positions, self.engine.config.pages * 64)
        self.positions = room

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/health", self.health),
                Route("/metrics", self.metrics),
            ],
            exception_handlers={404: self._no_route, 405: self._no_route},
        )

    # --- routes --------------------------------------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models."""
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "deepseek_ops"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: 200 while requests are taken."""
        if self.worker.broken or self.draining or not self.worker.is_alive():
            status = f"broken: {self.worker.broken}" if self.worker.broken else "shutting down"
            return JSONResponse({"status": status}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, http: HttpRequest) -> Response:
        """GET /metrics, in Prometheus' text format."""
        engine, lines = self.engine, []
        gauges = {
            "running_requests": len(engine.running),
            "waiting_requests": len(engine.waiting),
            "active_responses": self.active,
            "pages": engine.pool.total,
            "pages_held": engine.pool.held,
            "pages_resting": engine.pool.resting,
        }
        for name, value in gauges.items():
            lines += [f"# TYPE deepseek_{name} gauge", f"deepseek_{name} {value}"]
        stats = {**engine.stats, "evictions": engine.pool.evictions}
        for name, value in sorted(stats.items()):
            lines += [f"# TYPE deepseek_{name}_total counter", f"deepseek_{name}_total {value}"]
        lines.append("# TYPE deepseek_responses_total counter")
        lines += [f'deepseek_responses_total{{status="{s}"}} {n}' for s, n in sorted(self.statuses.items())]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def completions(self, http: HttpRequest) -> Response:
        """POST /v1/completions."""
        return await self._generate(http, chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(http, chat=True)

    async def _no_route(self, http: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        message = f"path: there is no {http.method} {http.url.path}"
        return JSONResponse(error_body(message), status, getattr(error, "headers", None))

    # --- one request ---------------------------------------------------------------------------------------------

    async def _generate(self, http: HttpRequest, *, chat: bool) -> Response:
        response: Response | None = None
        self.active += 1  # a client that is still sending counts too
        try:
            if self.draining or self.engine.closed:
                body = error_body("the server is shutting down", "server_error", "shutting_down")
                raise Refusal(503, body, {"Retry-After": "5", "Connection": "close"})
            if self.active > self.limits.concurrent:
                raise self._busy(f"{self.limits.concurrent} responses are under way")
            asked = await self._read(http, chat)
            # From here on the answer owns the requests: it cancels what it cannot finish.
            answer = Answer(self, asked, self._submit(asked))
            response = answer if asked.options.stream else await answer.whole(http.receive)
        except Refusal as refusal:
            response = refusal.response
        finally:
            if not isinstance(response, Answer):  # that one is under way until its last event
                self.active -= 1
        self.statuses[response.status_code] += 1
        return response

    def _busy(self, why: str) -> Refusal:
        body = error_body(f"too many requests: {why}; try again later", "rate_limit_error", "busy")
        return Refusal(429, body, {"Retry-After": "1"})

    async def _read(self, http: HttpRequest, chat: bool) -> Asked:
        most, body = self.limits.body_bytes, bytearray()
        refusal = Refusal(
            413, error_body(f"body: must have at most {most} bytes; got more"), {"Connection": "close"}
        )
        declared = http.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise refusal
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for part in http.stream():
                    body += part
                    if len(body) > most:
                        raise refusal
        except TimeoutError:
            message = f"body: must come within {self.limits.read_seconds:g} seconds; got {len(body)} bytes"
            raise Refusal(408, error_body(message), {"Connection": "close"}) from None
        # A long prompt takes a while to read and to encode; others shall not wait for it.
        return await asyncio.to_thread(self._understand, bytes(body), chat)

    def _understand(self, body: bytes, chat: bool) -> Asked:
        try:
            value = json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise Refusal(400, error_body(f"body: must be JSON; got {error}")) from None
        try:
            return parse(
                value,
                chat=chat,
                model=self.name,
                tokenizer=self.tokenizer,
                limits=self.limits,
                positions=self.positions,
            )
        except UserError as error:
            raise Refusal(400, error_body(str(error))) from None

    def _submit(self, asked: Asked) -> list[Request]:
        requests: list[Request] = []
        try:
            for prompt, sampling in asked.jobs:
                requests.append(self.engine.submit(prompt, sampling))
        except UserError as error:
            for request in requests:
                self.engine.cancel(request)
            if isinstance(error, QueueFull):
                raise self._busy(str(error)) from None
            if self.engine.closed:
                raise Refusal(503, error_body(str(error), "server_error", "closed")) from None
            raise Refusal(400, error_body(str(error))) from None
        return requests


def _no_constant(name: str) -> None:
    """NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(f"{name} is not a JSON value")


class Answer(Response):
    """The requests of one HTTP request, answered whole or as server-sent events."""

    def __init__(self, service: Service, asked: Asked, requests: list[Request]) -> None:
        self.service, self.asked, self.requests = service, asked, requests
        self.status_code, self.background = 200, None
        self.news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                loop.call_soon_threadsafe(self.news.set)

        for request in requests:
            request.listener = tell

    def close(self) -> None:
        """Give up what is not finished."""
        for request in self.requests:
            if request.finish is None:
                self.service.engine.cancel(request)

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(choice, chunk) as they come."""
        unfinished = dict(enumerate(self.requests))
        while unfinished:
            self.news.clear()
            for index, request in list(unfinished.items()):
                if (chunk := request.take()) is not None:
                    if chunk.finish is not None:
                        del unfinished[index]
                    yield index, chunk
            if unfinished:
                await self.news.wait()

    def fault(self) -> dict[str, Any] | None:
        """The error object if a request ended with one."""
        errors = [request.error for request in self.requests if request.finish == "error"]
        return error_body(errors[0], "server_error", "engine") if errors else None

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens so far."""
        answered = sum(request.answered for request in self.requests)
        return usage(self.asked, answered, sum(request.shared_tokens for request in self.requests))

    async def whole(self, receive: Receive) -> Response:
        """All choices in one body."""
        try:
            whole = [Chunk() for _ in self.requests]

            async def collect() -> None:
                async for index, chunk in self.chunks():
                    one = whole[index]
                    one.text += chunk.text
                    one.tokens += chunk.tokens
                    one.logprobs += chunk.logprobs
                    one.finish = chunk.finish

            if not await _unless_gone(collect(), receive):
                return Response(status_code=499)  # nobody is there to read it
            if (fault := self.fault()) is not None:
                return JSONResponse(fault, 503 if self.service.engine.closed else 500)
            choices = [
                choice(self.asked, index, chunk, self.service.tokenizer, streamed=False)
                for index, chunk in enumerate(whole)
            ]
            return JSONResponse({**envelope(self.asked, choices, streamed=False), "usage": self.usage()})
        finally:
            self.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events; starlette calls this once the handler has returned the answer."""
        try:
            with contextlib.suppress(TimeoutError, OSError):  # a reader that is too slow, or has just gone
                await _unless_gone(self._events(send), receive)
        finally:
            self.close()
            self.service.active -= 1

    async def _events(self, send: Send) -> None:
        async def write(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self.service.limits.write_seconds):
                await send(message)

        async def event(value: Any) -> None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            await write(
                {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True}
            )

        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await write({"type": "http.response.start", "status": 200, "headers": raw})
        begun: set[int] = set()
        async for index, chunk in self.chunks():
            if chunk.finish == "error":
                continue  # the fault below says it
            options = {"streamed": True, "first": index not in begun}
            one = choice(self.asked, index, chunk, self.service.tokenizer, **options)
            begun.add(index)
            await event(envelope(self.asked, [one], streamed=True))
        if (fault := self.fault()) is not None:
            await event(fault)
        elif self.asked.options.stream_options.include_usage:
            await event({**envelope(self.asked, [], streamed=True), "usage": self.usage()})
        await event("[DONE]")
        await write({"type": "http.response.body", "body": b""})


async def _unless_gone(work: Any, receive: Receive) -> bool:
    """Await `work` unless the client goes first; whether it was finished. Its errors are raised here."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
