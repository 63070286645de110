"""An OpenAI-compatible endpoint for a trained run: `python -m examples.serve runs/tiny`.

    curl localhost:8000/v1/completions -d '{"model": "tiny", "prompt": "KING", "max_tokens": 40, "stream": true}'

Listens on this machine only unless --host says otherwise: there is no authentication. SIGTERM or Ctrl-C stops taking
requests (503), finishes those under way or cuts them after --drain seconds, and ends with status 0; a second signal ends
at once.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from examples.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__.split("\n\n")[0])
    arguments.add_argument("run", type=Path, help="a run folder of examples.run")
    arguments.add_argument("--stage", help="whose weights (default: the last stage that has any)")
    arguments.add_argument("--name", help="the model's name in requests (default: the folder's)")
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    arguments.add_argument("--port", type=int, default=8000, help="0: any free one (default %(default)s)")
    arguments.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    arguments.add_argument(
        "--drain", type=float, default=30.0, help="seconds for requests under way at the end"
    )
    engine = arguments.add_argument_group("engine")
    engine.add_argument("--pages", type=int, default=1024, help="pages of 64 tokens (default %(default)s)")
    engine.add_argument(
        "--max-running", type=int, default=32, help="requests in a pass (default %(default)s)"
    )
    engine.add_argument("--queue", type=int, default=256, help="requests that wait (default %(default)s)")
    engine.add_argument("--speculative", action="store_true", help="MTP drafts")
    engine.add_argument(
        "--invariance",
        choices=("none", "attention", "full"),
        default="attention",
        help="full: no neighbour can change a bit of an answer, at the price of batching (default %(default)s)",
    )
    limits = arguments.add_argument_group("limits")
    limits.add_argument("--max-prompt-tokens", type=int, default=1 << 17)
    limits.add_argument("--max-tokens", type=int, default=1 << 13)
    limits.add_argument("--max-choices", type=int, default=8, help="prompts times n of one request")
    limits.add_argument("--max-concurrent", type=int, default=256, help="responses under way")
    limits.add_argument("--max-body-bytes", type=int, default=1 << 20)
    limits.add_argument("--max-seconds", type=float, default=300.0, help="from a request to its last token")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(argv)
    try:
        return _serve(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _serve(options: argparse.Namespace) -> int:
    try:
        import uvicorn

        from examples.serving.app import Service
        from examples.serving.server import GracefulServer
    except ImportError as error:
        raise UserError(f"packages: {error.name} is missing; pip install -r requirements/run.txt") from None
    import torch

    from examples.rollout.engine import Engine, EngineConfig
    from examples.rollout.load import load_run
    from examples.rollout.worker import Worker
    from examples.serving.protocol import Limits

    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads: must be at least 1; got {options.threads}")
    if options.drain < 0:
        raise UserError(f"--drain: must be at least 0 seconds; got {options.drain}")
    if options.threads:
        torch.set_num_threads(options.threads)
    config = EngineConfig(
        pages=options.pages,
        max_running=options.max_running,
        max_waiting=options.queue,
        pass_tokens=max(512, 2 * options.max_running + 64),
        speculative=options.speculative,
        invariance=options.invariance,
    )
    limits = Limits(
        body_bytes=options.max_body_bytes,
        prompt_tokens=options.max_prompt_tokens,
        max_tokens=options.max_tokens,
        choices=options.max_choices,
        concurrent=options.max_concurrent,
        seconds=options.max_seconds,
    )
    listener = _listen(options.host, options.port)  # before the model is loaded: a used port answers at once
    loaded = load_run(options.run, options.stage)
    worker = Worker(Engine(loaded.model, config, tokenizer=loaded.tokenizer))
    service = Service(worker, options.name or options.run.resolve().name, limits)
    host, port = listener.getsockname()[:2]
    print(
        f"{service.name}: weights of stage {loaded.stage!r}, step {loaded.step}; "
        f"{config.pages * 64} tokens of cache, {config.max_running} requests at once\n"
        f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1",
        flush=True,
    )
    if not loaded.chats:
        print(
            "note: these weights were never trained on conversations; chat answers are continuations",
            flush=True,
        )
    settings = uvicorn.Config(
        service.app(),
        log_level="warning",
        lifespan="off",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        backlog=1024,
        limit_concurrency=limits.concurrent + 256,  # connections: a last wall before the service's own limit
        h11_max_incomplete_event_size=1 << 16,
    )
    worker.start()
    GracefulServer(settings, service, options.drain).run(sockets=[listener])
    worker.stop("the server has ended")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port: must be in [0, 65535]; got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except OSError as error:
        raise UserError(
            f"--host, --port: cannot listen on {host}:{port}: {error.strerror or error}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
