"""`world(n, function, *args)`: run a function on n ranks that are real processes, and get what each returned.

torch takes seconds to import, so ranks are forked from one server that has it (multiprocessing's forkserver: no thread has been
started there, whatever pytest's own process did before), and one pool of ranks serves a test module. Every call has a
hard deadline: a rank that does not answer is killed with its pool, and the test fails with every rank's stack.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import runpy
import signal
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.parallel.rank import PATIENCE

MOST_RANKS = 4
DEADLINE = PATIENCE + 40
RANK = str(Path(__file__).with_name("rank.py"))
_context = multiprocessing.get_context("forkserver")
# The last is what a first backward pass imports.
_context.set_forkserver_preload(
    ["torch.distributed", "pytest", "hypothesis", "torch.fx.experimental.symbolic_shapes"]
)


class Lost:
    """In place of a result: the rank was killed or stopped on purpose."""


class Pool:
    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder = tempfile.TemporaryDirectory()
        self.ranks, self.ready, self.number = [], set(), itertools.count()

    def start(self, size):
        while len(self.ranks) < size:
            here, there = _context.Pipe()
            rank = len(self.ranks)
            arguments = there, rank, self.store.port, os.path.join(self.folder.name, str(rank))
            process = _context.Process(
                target=runpy.run_path, args=(RANK, {"ARGUMENTS": arguments}, "__rank__"), daemon=True
            )
            process.start()
            there.close()
            self.ranks.append((process, here))
        for rank, (_, connection) in enumerate(self.ranks):
            if rank not in self.ready:
                assert connection.poll(DEADLINE), f"rank {rank} did not start"
                connection.recv_bytes()
                self.ready.add(rank)

    def __call__(self, size, function, *args, timeout=DEADLINE, lost=(), errors=False):
        """Results by rank; `function((store, rank, size), *args)`, importable by name.

        lost: ranks that will not answer. errors: return exceptions instead of raising the first of them.
        """
        assert size <= MOST_RANKS
        self.start(size)
        job = pickle.dumps((next(self.number), size, function, args))
        waiting = {}
        for rank, (_, connection) in enumerate(self.ranks[:size]):
            connection.send_bytes(job)
            if rank not in lost:
                waiting[connection] = rank
        results = [Lost() for _ in range(size)]
        end = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(end - time.monotonic(), 0))
            if not ready:
                stacks = self.stacks(waiting.values())
                self.kill()
                pytest.fail(f"rank(s) {sorted(waiting.values())} gave no answer in {timeout} s\n{stacks}")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    results[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self.kill()
                    pytest.fail(f"rank {rank} died")
        if lost:
            self.kill()
        for result in results:
            if isinstance(result, BaseException) and not errors:
                raise result
        return results

    def stacks(self, ranks):
        texts = []
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.3)
        for rank in ranks:
            with open(os.path.join(self.folder.name, str(rank))) as file:
                texts.append(f"--- rank {rank}\n{file.read()}")
        return "\n".join(texts)

    def kill(self):
        for process, connection in self.ranks:
            process.kill()
            connection.close()
        for process, _ in self.ranks:
            process.join(5)
        self.ranks, self.ready = [], set()


@pytest.fixture(scope="module")
def world():
    pool = Pool()
    yield pool
    pool.kill()
    pool.folder.cleanup()
