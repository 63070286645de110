"""A process that has imported everything forks for each command, which dies where it is told to.

Reads jobs from standard input, one JSON object a line, and answers each with a line: exit status, what was printed, touches.
"""

import json
import os
import signal
import sys
import tempfile
import traceback

TOUCHES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink", "shutil.rmtree")


class Moments:
    """Counts the moments at which this process touches the disk below `root`, by the folder there, and dies at one of them.

    Between two of them a kill leaves the same files, so these are all there are, but for half a line at a write, which is one too:
    `os.write` counts twice, before and in the middle. TensorBoard's files come from a thread of its own and are left out.
    """

    def __init__(self, root, folder=None, last=None):
        self.root, self.counts, self.folder, self.last = str(root) + os.sep, {}, folder, last

    def install(self):
        sys.addaudithook(self.audit)
        self.os_write, os.write = os.write, self.write

    def audit(self, event, args):
        if event == "open":
            path, mode, flags = args
            if not (
                any(c in "wax+" for c in mode) if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                return
        elif event in TOUCHES:
            path = args[0]
        else:
            return
        self.touch(path)

    def touch(self, path):
        if not isinstance(path, (str, os.PathLike)):
            return False
        path = os.path.abspath(path)
        if not path.startswith(self.root) or "tensorboard" in path:
            return False
        folder = path[len(self.root) :].split(os.sep)[0]
        self.counts[folder] = self.counts.get(folder, 0) + 1
        if folder == self.folder and self.counts[folder] == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return True

    def write(self, handle, content):
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not self.touch(path):
            return self.os_write(handle, content)
        half = self.os_write(handle, content[: len(content) // 2])
        self.touch(path)
        return half + self.os_write(handle, content[len(content) // 2 :])


def run(job, output):
    """In a forked process: the command, until it ends or its moment comes."""
    from examples.run import main

    moments = Moments(job["root"], job["folder"], job["last"])
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    moments.install()
    status = 70
    try:
        status = main(job["arguments"])
    except BaseException:  # noqa: BLE001 (whatever it was, the parent prints it)
        traceback.print_exc()
    sys.stdout.flush()
    output.seek(0, os.SEEK_END)
    output.write(f"\n{json.dumps(moments.counts)}".encode())
    output.flush()
    os._exit(status)


def serve():
    """One job after the other."""
    import torch

    from examples.stages.record import environment

    torch.set_num_threads(1)
    environment()  # asks git, once for all
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if not child:
                run(json.loads(line), output)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            said = output.read().decode(errors="replace")
        counts = {}
        if status == 0:
            said, _, last = said.rpartition("\n")
            counts = json.loads(last)
        print(json.dumps({"status": status, "said": said, "counts": counts}), flush=True)


if __name__ == "__main__":
    serve()
