"""`examples.serve` and `examples.chat` as a user starts them, on a run folder with a tiny random model."""

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from examples import chat, serve
from examples.configs import to_dict
from examples.errors import UserError
from examples.model.transformer import Transformer
from examples.rollout.engine import Engine, EngineConfig
from examples.rollout.load import load_run
from examples.stages.stage import write_json
from examples.stages.tokenize import tokenizer_path
from examples.train.checkpoint import save_checkpoint
from tests.examples.serving.conftest import make_tokenizer, small_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder as training leaves it."""
    root = tmp_path_factory.mktemp("run") / "mine"
    tokenizer = make_tokenizer()
    config = small_config(tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(config.model)
    tokenizer.save(tokenizer_path(root))
    write_json(root / "config.json", to_dict(config))
    save_checkpoint(root / "pretrain", 7, {"model": model.state_dict()}, {"config": to_dict(config)})
    return root


def test_a_run_folder_loads_with_the_weights_it_was_saved_with(folder, tmp_path):
    loaded = load_run(folder)
    torch.manual_seed(0)
    wanted = Transformer(loaded.model.config).state_dict()
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    assert (loaded.stage, loaded.step, loaded.chats, loaded.model.training) == ("pretrain", 7, False, False)
    for root, stage, message in (
        (tmp_path, None, "run folder: must be one of examples.run"),
        (folder, "fp8", "stage 'fp8' must have a checkpoint .stages with one: pretrain."),
        (folder, "../x", "must have a checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            load_run(root, stage)


@pytest.fixture
def started(folder):
    """Start `python -m examples.serve` on a free port: (process, port)."""
    processes = []

    def start(*options):
        command = [
            sys.executable,
            "-m",
            "examples.serve",
            str(folder),
            "--port",
            "0",
            "--threads",
            "1",
            *options,
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        for line in process.stdout:
            if line.startswith("listening on http://127.0.0.1:"):
                port = int(line.split(":")[2].split("/")[0])
                break
        else:
            raise AssertionError(process.stderr.read())
        for _ in range(500):
            try:
                assert ask(port, "GET", "/health")[0] == 200
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        return process, port

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body and json.dumps(body))
    response = connection.getresponse()
    return response.status, response.read()


def open_stream(port, **more):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"model": "mine", "prompt": [5], "max_tokens": 250, "stream": True, **more}
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200 and response.readline().startswith(b"data: ")
    return response


def test_sigterm_finishes_what_is_under_way_refuses_what_is_new_and_cuts_at_the_deadline(started):
    process, port = started("--drain", "1.5", "--max-running", "1", "--pages", "16")
    # One answer at a time: the last of these streams cannot be finished in time, the first can.
    streams = [open_stream(port)]
    late = [threading.Thread(target=lambda: results.append(read_late(port))) for _ in range(40)]
    results = []

    def read_late(port):
        body = {"model": "mine", "prompt": [5], "max_tokens": 250}
        return ask(port, "POST", "/v1/completions", body)

    for thread in late:
        thread.start()
    while b"deepseek_waiting_requests 0\n" in ask(port, "GET", "/metrics")[1]:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for _ in range(100):
        status, body = ask(port, "GET", "/health")
        if status == 503:
            break
    assert json.loads(body) == {"status": "shutting down"}
    status, body = ask(port, "POST", "/v1/completions", {"model": "mine", "prompt": "a"})
    assert status == 503 and json.loads(body)["error"]["code"] == "shutting_down"
    assert streams[0].read().endswith(b"data: [DONE]\n\n")
    for thread in late:
        thread.join()
    assert process.wait(20) == 0, process.stderr.read()
    assert process.stderr.read() == ""
    statuses = [status for status, _ in results]
    assert 503 in statuses and set(statuses) <= {200, 503} and len(statuses) == 40
    for status, body in results:
        answer = json.loads(body)
        if status == 200:
            assert answer["usage"]["completion_tokens"] > 0
        else:
            assert "shutting down" in answer["error"]["message"]


def test_serve_errors(folder, capsys, tmp_path):
    for arguments, message in (
        ([str(tmp_path)], "run folder: must be one of examples.run"),
        ([str(folder), "--port", "70000"], "--port: must be in"),
        ([str(folder), "--host", "203.0.113.1", "--port", "0"], "cannot listen on"),
        ([str(folder), "--pages", "0"], "pages: must be at least 1"),
        ([str(folder), "--max-seconds", "-1"], "seconds: must be above 0"),
    ):
        assert serve.main([*arguments, *([] if "--port" in arguments else ["--port", "0"])]) == 2
        assert message in capsys.readouterr().err


def piped(monkeypatch, capsys, folder, text, *options):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    status = chat.main([str(folder), "--seed", "3", "--max-tokens", "20", *options])
    return status, capsys.readouterr()


def test_chat_in_a_pipe(folder, monkeypatch, capsys):
    status, once = piped(monkeypatch, capsys, folder, "the cat\n")
    assert status == 0 and once.err == "" and once.out.endswith("\n")
    assert (
        piped(monkeypatch, capsys, folder, "the cat")[1].out == once.out
    )  # seeded; the last line may lack its end
    assert piped(monkeypatch, capsys, folder, "\nthe cat\n", "--speculative")[1].out == once.out
    status, long = piped(monkeypatch, capsys, folder, "the cat\n" * 40)  # longer than the context
    assert status == 0 and long.out.startswith(once.out)
    status, wrong = piped(monkeypatch, capsys, folder, "/what\n" + "x" * 3000 + "\n/quit\nnever")
    assert status == 2 and "/what: there is no such command" in wrong.err
    assert "message: must leave room for an answer" in wrong.err and wrong.out == ""
    assert piped(monkeypatch, capsys, folder, "", "--max-tokens", "0")[0] == 2


def test_chat_commands_and_a_stopped_answer(folder):
    loaded = load_run(folder)
    engine = Engine(loaded.model, EngineConfig(pages=8, max_running=1), tokenizer=loaded.tokenizer)
    talk = chat.Conversation(engine, 20, 0.0, 1.0, 0)
    chat._turn(talk, "/system be a cat", strict=False)
    chat._turn(talk, "the cat", strict=False)
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    chat._turn(talk, "/reset", strict=False)
    assert talk.messages == [{"role": "system", "content": "be a cat"}]

    class Impatient(io.StringIO):
        writes = 0

        def write(self, text):
            self.writes += 1
            if self.writes == 3:
                raise KeyboardInterrupt
            return super().write(text)

    out = Impatient()
    talk.say("sat", out)
    assert out.getvalue().endswith(" [stopped]\n")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert engine.pool.held == 0 and not engine.running  # its pages are free at once
    talk.say("on", io.StringIO())  # and the talk goes on
    chat._turn(talk, "/system", strict=False)
    assert talk.messages == []


def test_chat_survives_a_reader_that_goes(folder):
    command = f"printf 'the cat\\nsat\\n' | {sys.executable} -m examples.chat {folder} --seed 1 | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        check=False,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0 and done.stderr == b"" and len(done.stdout) == 1
