"""A real server on a free port of this machine, and clients that may be slow, rude or gone."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import replace

import pytest
import torch
import uvicorn

from examples.configs import get_config
from examples.data.tokenizer import Tokenizer
from examples.model.transformer import Transformer
from examples.rollout.engine import Engine, EngineConfig
from examples.rollout.worker import Worker
from examples.serving.app import Service
from examples.serving.protocol import Limits


def make_tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat über 日本語 🙂"] * 4, 300)


def small_config(vocab_size: int):
    run = get_config("tiny")
    model = replace(
        run.model,
        vocab_size=vocab_size,
        num_layers=1,
        num_dense_layers=1,
        hidden_size=32,
        dense_inner_size=32,
        init_std=0.1,
        precision="fp32",
    )
    return replace(run, model=model)


class Client:
    """HTTP/1.1 by hand, one connection each, so that a test decides when to read and when to leave."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def open(self, body, path="/v1/completions", *, method="POST", headers=()):
        """Send a request; returns (reader, writer) with nothing read yet."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [
            f"{method} {path} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(data)}",
            *headers,
            "Connection: close",
        ]
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        await writer.drain()
        return reader, writer

    async def ask(self, body, path="/v1/completions", **options):
        """(status, headers, body bytes)."""
        reader, writer = await self.open(body, path, **options)
        try:
            return await self.read(reader)
        finally:
            writer.close()

    @staticmethod
    async def read(reader):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        rest = await reader.read()
        if headers.get("transfer-encoding") == "chunked":
            whole = b""
            while rest:
                size, _, rest = rest.partition(b"\r\n")
                whole += rest[: int(size, 16)]
                rest = rest[int(size, 16) + 2 :]
            rest = whole
        return int(head[0].split()[1]), headers, rest

    async def json(self, body, path="/v1/completions", **options):
        status, _, data = await self.ask(body, path, **options)
        return status, json.loads(data)

    async def events(self, body, path="/v1/completions"):
        """The parsed events of a stream; checks that it ends as it should."""
        status, headers, data = await self.ask({**body, "stream": True}, path)
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), data
        lines = [line for line in data.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Running:
    """A server in a thread."""

    def __init__(self, limits=None, **engine) -> None:
        tokenizer = make_tokenizer()
        torch.manual_seed(0)
        model = Transformer(small_config(tokenizer.vocab_size).model).eval()
        config = EngineConfig(**{"pages": 64, "max_running": 16, **engine})
        self.engine = Engine(model, config, tokenizer=tokenizer)
        self.service = Service(Worker(self.engine), "tiny", limits or Limits())
        settings = uvicorn.Config(
            self.service.app(), port=0, log_level="error", lifespan="off", backlog=1024, ws="none"
        )
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.service.worker.start()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = Client(self.port)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.service.worker.stop("test over")
        assert not self.thread.is_alive() and not self.service.worker.is_alive()

    async def idle(self, seconds=10.0):
        """Wait until nobody is answered and every page is free."""
        end = time.monotonic() + seconds
        while self.service.active or self.engine.running or self.engine.waiting or self.engine.pool.held:
            assert time.monotonic() < end, (self.service.active, self.engine.pool.held, self.engine.stats)
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def served():
    """A server with the default limits, shared by the tests of a file."""
    with Running() as running:
        yield running


@pytest.fixture
def serving():
    """The class, for a server with limits of its own."""
    return Running
