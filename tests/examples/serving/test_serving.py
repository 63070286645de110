"""The endpoint: OpenAI's shapes, named errors, limits, and no client that can hurt another."""

import asyncio
import json
import random
import threading
import time

import pytest

from examples.rollout.sampling import Sampling
from examples.serving.protocol import Limits

ASK = {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "seed": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the cat"}], "max_tokens": 12, "seed": 1}
ENDPOINTS = (("/v1/completions", ASK), ("/v1/chat/completions", CHAT))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def text_of(choice):
    if "text" in choice:
        return choice["text"]
    return choice["message"]["content"] if "message" in choice else choice["delta"].get("content", "")


def test_models_health_metrics(served):
    async def go():
        models = await served.client.json(b"", "/v1/models", method="GET")
        assert models[0] == 200 and models[1]["data"][0]["id"] == "tiny"
        assert await served.client.json(b"", "/health", method="GET") == (200, {"status": "ok"})
        await served.client.json(ASK)
        status, headers, data = await served.client.ask(b"", "/metrics", method="GET")
        assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
        values = dict(line.rsplit(" ", 1) for line in data.decode().splitlines() if line[0] != "#")
        assert float(values["deepseek_pages"]) == 64
        assert float(values["deepseek_generated_tokens_total"]) >= 12
        assert float(values['deepseek_responses_total{status="200"}']) >= 1

    run(go())


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
def test_streamed_and_whole_answers_are_the_engines(served, path, body):
    async def go():
        return await served.client.json(body, path), await served.client.events(
            {**body, "stream_options": {"include_usage": True}}, path
        )

    (status, whole), events = run(go())
    assert status == 200, whole
    tokenizer = served.engine.tokenizer
    prompt = tokenizer.encode("the cat")
    ids = [tokenizer.bos_id, *prompt]
    if "messages" in body:
        ids = [tokenizer.bos_id, tokenizer.user_id, *prompt, tokenizer.assistant_id]
    sampling = Sampling(12, temperature=1.0, seed=1, stop_tokens=frozenset({tokenizer.eos_id}))
    request = served.engine.submit(ids, sampling)
    wanted = "".join(chunk.text for chunk in served.service.worker.stream(request))
    assert text_of(whole["choices"][0]) == wanted
    assert "".join(text_of(c) for e in events for c in e["choices"]) == wanted
    assert events[-1]["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert whole["usage"]["completion_tokens"] == request.answered
    reasons = [c["finish_reason"] for e in events for c in e["choices"]]
    assert reasons[-1] == whole["choices"][0]["finish_reason"] == request.finish
    assert set(reasons[:-1]) == {None}
    assert whole["object"] == ("chat.completion" if "messages" in body else "text_completion")


def early_text(served, seed):
    """Whether this seed's answer has text after four of its twelve tokens; which seeds do differs between CPUs."""
    tokenizer = served.engine.tokenizer
    sampling = Sampling(12, temperature=1.0, seed=seed, stop_tokens=frozenset({tokenizer.eos_id}))
    request = served.engine.submit([tokenizer.bos_id, *tokenizer.encode("the cat")], sampling)
    tokens = [token for chunk in served.service.worker.stream(request) for token in chunk.tokens]
    return len(tokens) == 12 and tokenizer.decode(tokens[:4])[:1] not in ("", "\ufffd")


def test_a_stream_is_read_while_the_answer_is_made(served, monkeypatch):
    """The engine is held after six passes, of which one fills the cache: what they gave must have come by then."""
    seed = next(seed for seed in range(1000) if early_text(served, seed))
    passes, step = threading.Semaphore(6), served.engine.step

    def held():
        assert passes.acquire(timeout=30)
        return step()

    async def go():
        reader, writer = await served.client.open({**ASK, "seed": seed, "stream": True})
        await reader.readuntil(b"\r\n\r\n")
        event = b""
        while b"data: " not in event:
            event = await reader.readuntil(b"\n")
        first = json.loads(event.partition(b"data: ")[2])["choices"][0]
        assert text_of(first) and first["finish_reason"] is None
        (request,) = served.engine.running
        assert request.finish is None and request.answered <= 6
        passes.release(1000)
        assert b"data: [DONE]" in await reader.read()
        writer.close()

    monkeypatch.setattr(served.engine, "step", held)
    run(go())


def test_choices_stops_and_logprobs(served):
    async def go():
        body = {**ASK, "prompt": ["the cat", "sat"], "n": 3, "logprobs": 0}
        status, answer = await served.client.json(body)
        assert status == 200 and [c["index"] for c in answer["choices"]] == list(range(6))
        assert len({c["text"] for c in answer["choices"][:3]}) > 1  # each choice has a seed of its own
        for choice in answer["choices"]:
            assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) <= 12
            assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
        text = answer["choices"][0]["text"]
        stop = text[4:6]
        _, stopped = await served.client.json({**ASK, "stop": stop})
        assert stopped["choices"][0]["text"] == text[: text.index(stop)]
        assert stopped["choices"][0]["finish_reason"] == "stop"
        _, chat = await served.client.json({**CHAT, "logprobs": True}, "/v1/chat/completions")
        for entry in chat["choices"][0]["logprobs"]["content"]:
            assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] and entry["logprob"] <= 0
        parts = [{"type": "text", "text": "the"}, {"type": "text", "text": " cat"}]
        message = {"role": "user", "content": parts}
        _, joined = await served.client.json({**CHAT, "messages": [message]}, "/v1/chat/completions")
        assert text_of(joined["choices"][0]) == text_of(chat["choices"][0])

    run(go())


COMPLETION_ERRORS = [
    (b"{", "body", "must be JSON"),
    (b"[" * 100000, "body", "must be JSON"),
    (b'{"max_tokens": NaN}', "body", "NaN is not a JSON value"),
    (b'{"seed": ' + b"9" * 10000 + b"}", "body", "must be JSON"),
    (b"\xff\xfe\x00", "body", "must be JSON"),
    ([], "body", "must be a JSON object; got list"),
    ({}, "prompt", "is missing"),
    ({"prompt": "a"}, "model", "is missing"),
    ({**ASK, "model": "gpt"}, "model", "must be 'tiny'; got 'gpt'"),
    ({**ASK, "prompt": []}, "prompt", "must be text, tokens"),
    ({**ASK, "prompt": 5}, "prompt", "must be text, tokens"),
    ({**ASK, "prompt": [1, "a"]}, "prompt", "must be text, tokens"),
    ({**ASK, "prompt": [1, -1]}, "prompt", "tokens must be in [0,"),
    ({**ASK, "prompt": [True]}, "prompt", "must be text, tokens"),
    ({**ASK, "prompt": [5] * 256}, "prompt", "must have at most 255 tokens; got 256"),
    ({**ASK, "max_tokens": 0}, "max_tokens", "must be in [1, "),
    ({**ASK, "max_tokens": 10**6}, "max_tokens", "must be in [1, "),
    ({**ASK, "max_tokens": "many"}, "max_tokens", "must be a whole number"),
    ({**ASK, "max_tokens": True}, "max_tokens", "must be a whole number"),
    ({**ASK, "temperature": -1}, "temperature", "must be in [0, 100]"),
    ({**ASK, "top_p": 0}, "top_p", "must be in (0, 1]"),
    ({**ASK, "top_k": -1}, "top_k", "at least 0"),
    ({**ASK, "n": 0}, "n", "must be in [1, 8]"),
    ({**ASK, "n": 9}, "n", "must be in [1, 8]"),
    ({**ASK, "prompt": ["a"] * 3, "n": 3}, "n", "must be in [1, 2] for 3 prompts"),
    ({**ASK, "seed": 1 << 70}, "seed", "within 62 bits"),
    ({**ASK, "stop": ["a"] * 17}, "stop", "at most 16 strings"),
    ({**ASK, "stop": [""]}, "stop", "1 to 256 characters"),
    ({**ASK, "stop": [1]}, "stop[0]", "must be text"),
    ({**ASK, "logprobs": 5}, "logprobs", "must be 0"),
    ({**ASK, "presence_penalty": 1}, "presence_penalty", "is not supported"),
    ({**ASK, "temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({**ASK, "stream_options": {"usage": 1}}, "stream_options.usage", "there is no such key"),
]
CHAT_ERRORS = [
    ({**CHAT, "messages": []}, "messages", "at least one message"),
    ({**CHAT, "messages": "hello"}, "messages", "must be a list"),
    ({**CHAT, "messages": [{"role": "user"}]}, "messages", "message 0 must have 'role' and 'content'"),
    ({**CHAT, "messages": [{"role": "cook", "content": "a"}]}, "messages", "got 'cook'"),
    ({**CHAT, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages", "must be text"),
    ({**CHAT, "tools": [{}]}, "tools", "is not supported"),
]


def test_malformed_bodies_name_the_field(served):
    async def go():
        cases = [("/v1/completions", case) for case in COMPLETION_ERRORS]
        cases += [("/v1/chat/completions", case) for case in CHAT_ERRORS]
        for path, (body, field, message) in cases:
            status, answer = await served.client.json(body, path)
            assert status == 400, (body, answer)
            assert answer["error"]["param"] == field, (body, answer)
            assert message in answer["error"]["message"], (body, answer)
            assert answer["error"]["type"] == "invalid_request_error"
        status, answer = await served.client.json(b"", "/v2", method="GET")
        assert status == 404 and "there is no GET /v2" in answer["error"]["message"]
        assert (await served.client.json(b"", "/v1/completions", method="GET"))[0] == 405
        await served.idle()

    run(go())


def test_limits_on_bodies(serving):
    async def go(running):
        status, answer = await running.client.json({**ASK, "prompt": "x" * 5000})
        assert status == 413 and "at most 2000 bytes" in answer["error"]["message"]
        # No length declared: counted as it comes.
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"fa0\r\n" + b"x" * 4000 + b"\r\n")
        assert (await reader.readline()).split()[1] == b"413"
        writer.close()
        # Declared and never sent.
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert (await reader.readline()).split()[1] == b"408"
        writer.close()
        status, answer = await running.client.json(ASK | {"max_tokens": 9})
        assert status == 400 and answer["error"]["param"] == "max_tokens"
        status, answer = await running.client.json(ASK | {"prompt": [5] * 31, "max_tokens": 1})
        assert status == 400 and "at most 30 tokens; got 31" in answer["error"]["message"]

    with serving(Limits(body_bytes=2000, read_seconds=0.3, max_tokens=8, prompt_tokens=30)) as running:
        run(go(running))


def test_a_full_house_answers_429_and_recovers(serving):
    async def go(running):
        long = {**ASK, "max_tokens": 200}
        answers = await asyncio.gather(*(running.client.ask(long) for _ in range(30)))
        statuses = [status for status, _, _ in answers]
        assert set(statuses) == {200, 429}
        refused = next(answer for answer in answers if answer[0] == 429)
        assert refused[1]["retry-after"] == "1"
        assert json.loads(refused[2])["error"]["type"] == "rate_limit_error"
        assert statuses.count(200) >= 2
        assert (await running.client.json(ASK))[0] == 200
        await running.idle()

    with serving(max_running=2, max_waiting=2) as running:  # the queue is the limit
        run(go(running))
        # Half of a request's choices do not stay behind when the other half finds no room.
        status, _ = run(running.client.json({**ASK, "n": 8, "max_tokens": 200}))
        assert status == 429
        run(running.idle())
    with serving(Limits(concurrent=3)) as running:  # responses under way are
        run(go(running))


def test_two_hundred_at_once_with_slow_and_vanishing_clients(serving):
    """Every patient client gets what it would get alone; the others cost nobody anything; then every page is free."""
    rng = random.Random(0)

    async def patient(client, number):
        path, body = ENDPOINTS[number % 2]
        body = {**body, "seed": number % 7, "max_tokens": 10 + number % 5}
        if number % 3:
            _, answer = await client.json(body, path)
            return number, text_of(answer["choices"][0])
        events = await client.events(body, path)
        return number, "".join(text_of(c) for e in events for c in e["choices"])

    async def slow(client):
        reader, writer = await client.open({**ASK, "max_tokens": 60, "stream": True})
        data = b""
        while piece := await reader.read(40):
            data += piece
            await asyncio.sleep(0.01)
        assert b"[DONE]" in data
        writer.close()

    async def vanishing(client):
        body = {**ASK, "max_tokens": 200, "n": 2, "stream": rng.random() < 0.5}
        reader, writer = await client.open(body)
        if body["stream"] and rng.random() < 0.5:
            await reader.readuntil(b"data: ")
        else:
            await asyncio.sleep(rng.random() * 0.2)
        writer.transport.abort() if rng.random() < 0.5 else writer.close()

    async def go(running):
        client = running.client
        tasks = [patient(client, n) for n in range(130)]
        tasks += [slow(client) for _ in range(20)] + [vanishing(client) for _ in range(50)]
        rng.shuffle(tasks)
        results = await asyncio.gather(*tasks)
        await running.idle()
        assert running.engine.stats["finished_cancelled"] > 0
        seen = dict(result for result in results if result is not None)
        assert len(seen) == 130
        for number in range(0, 130, 13):  # alone
            assert (await patient(client, number))[1] == seen[number]

    with serving(max_waiting=400, pages=40) as running:
        run(go(running))


def test_a_client_that_reads_nothing_is_dropped_and_holds_no_pages(serving):
    """Its answer is finished at the engine's pace, and its connection ends once there is no room for a byte."""

    async def go(running):
        # The socket buffers of this machine would hold the whole answer: a transport that is always full stands for them.
        blocked, service = asyncio.Event(), running.service
        sent, received = [], asyncio.Queue()

        async def send(message):
            sent.append(message)
            if len(sent) > 3:
                await blocked.wait()

        body = json.dumps({**ASK, "max_tokens": 100, "stream": True}).encode()
        await received.put({"type": "http.request", "body": body})
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [],
            "query_string": b"",
        }
        start = time.monotonic()
        task = asyncio.ensure_future(service.app()(scope, received.get, send))
        await asyncio.sleep(0.05)
        assert (await running.client.json(ASK))[0] == 200  # meanwhile others are answered
        await task
        assert 0.4 <= time.monotonic() - start < 20
        await running.idle()

    with serving(Limits(write_seconds=0.5)) as running:
        run(go(running))


def test_deadlines_and_engine_faults_are_said(serving):
    async def go(running):
        status, answer = await running.client.json({**ASK, "max_tokens": 240})
        assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] < 240
        await running.idle()

    with serving(Limits(seconds=0.02)) as running:
        run(go(running))

    async def broken(running):
        running.engine._pass = lambda work: 1 // 0
        status, answer = await running.client.json(ASK)
        assert status in (500, 503) and "ZeroDivisionError" in answer["error"]["message"]
        assert (await running.client.json(ASK))[0] == 503
        status, answer = await running.client.json(b"", "/health", method="GET")
        assert status == 503 and "ZeroDivisionError" in answer["status"]

    with serving() as running:
        run(broken(running))
