"""A rank of tests/parallel: joins the process group of each job that it is sent, runs a function, answers.

Not imported but run (`runpy`), in a process forked from one that has torch: a package named `tests` of some distribution
may hide this folder there, and here it is put right before anything of it is imported.
"""

import faulthandler
import pickle
import signal
import sys
import traceback
import types
from pathlib import Path

PATIENCE = (
    200.0  # seconds for a collective where nothing goes wrong: a busy machine may stand still for a minute
)


def serve(connection, rank, port, stacks):
    """Until the other end of `connection` closes."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    log = open(stacks, "w")  # noqa: SIM115 (open as long as the process lives)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    connection.send_bytes(b"ready")
    while True:
        try:
            number, size, function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        server = dist.TCPStore("127.0.0.1", port, is_master=False)
        try:
            answer = function((dist.PrefixStore(f"job{number}", server), rank, size), *args)
        except BaseException as error:  # noqa: BLE001 (the test sees it)
            error.add_note(traceback.format_exc())
            answer = error
        try:
            payload = pickle.dumps(answer)
            pickle.loads(payload)
        except Exception:  # noqa: BLE001 (an answer that cannot be sent)
            payload = pickle.dumps(RuntimeError(f"rank {rank}: {answer!r}"))
        connection.send_bytes(payload)


if __name__ == "__rank__":
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(root))
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(root / "tests")]
    serve(*ARGUMENTS)  # noqa: F821 (given by runpy)
