"""The sandbox holds: what attacks of a program reach, what is left of it, and what the caller learns, level by level."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from examples.errors import UserError
from examples.rewards import sandbox
from examples.rewards.sandbox import Limits, Protection, Result, Sandbox
from tests.examples.sandboxes import NOBODY, kernel_allows, make_sandbox, public_python, readable_by_all

ROOT = Path(sandbox.__file__).parents[2]
QUICK = Limits(wall_seconds=120, cpu_seconds=3, memory_mib=160)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


def _sandbox(level, limits=QUICK):
    return make_sandbox(level, limits)


@pytest.fixture(params=["namespaces", "landlock"])
def level(request):
    _sandbox(request.param)
    return request.param


@pytest.fixture
def open_folder():
    """A folder that every user can read, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def name():
    """Of a program's processes, to find them in the machine's list."""
    return "sb" + secrets.token_hex(6)


def _named(name):
    """First lines of a program that takes the name."""
    return f"import ctypes, os, time\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n"


def _alive(name):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "comm").read_text().strip() == name:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [entry.name] if state != "Z" else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# --- what a program sees and gives back ---------------------------------------------------------------------------


def test_a_program_finds_an_empty_world(level, monkeypatch):
    monkeypatch.setenv("SECRET", "hush")
    program = """
        import json, os, sys
        open("made", "w").write("x")
        assert os.stat(".").st_mode & 0o777 == 0o700
        print(json.dumps([dict(os.environ), os.listdir("."), sys.stdin.read(), os.getuid(), sys.argv[1:], __name__,
                          hash("a")]))
        print("Größe", file=sys.stderr)
    """
    first, second = (_sandbox(level).run(textwrap.dedent(program)) for _ in range(2))
    assert first.status == "ok" and first.exit_code == 0 and first.stderr == "Größe\n"
    environment, listing, stdin, uid, argv, name, hashed = json.loads(first.stdout)
    assert not any("SECRET" in key or "hush" in value for key, value in environment.items())
    assert (listing, stdin, argv, name) == (["made"], "", [], "__main__")
    assert uid != 0
    assert json.loads(second.stdout)[-1] == hashed  # the order of sets is the same in every run


@pytest.mark.parametrize(
    ("program", "status", "code", "detail"),
    [
        ("exit(0)", "ok", 0, ""),
        ("import sys; sys.exit(3)", "error", 3, ""),
        ("1/0", "error", 1, "ZeroDivisionError: division by zero"),
        ("def f(:", "error", 1, "SyntaxError: invalid syntax"),
        ("import os; os.abort()", "error", -6, "by SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "error", -11, "by SIGSEGV"),
        ("x = bytearray(1 << 30)", "memory", 1, "asked for more than 160 MiB"),
        ("import asyncio, json, decimal, re; asyncio.run(asyncio.sleep(0))", "ok", 0, ""),
    ],
)
def test_how_a_program_ends(program, status, code, detail):
    result = _sandbox(None).run(program)
    assert (result.status, result.exit_code, result.detail) == (status, code, detail), result.stderr
    assert result.ok == (status == "ok") and 0 < result.seconds < 120


# --- attacks -------------------------------------------------------------------------------------------------------

ATTACKS = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *args):
    if getattr(libc, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), name)

def connect(family, address):
    s = socket.socket(family); s.settimeout(2); s.connect(address); s.sendall(b"hello")

def write(path):
    open(path, "w").write("evil")

attacks = {
    "network": lambda: connect(socket.AF_INET, ("127.0.0.1", PORT)),
    "network6": lambda: connect(socket.AF_INET6, ("::1", PORT)),
    "unix socket": lambda: connect(socket.AF_UNIX, UNIX),
    "raw socket": lambda: call("socket", 2, 3, 1),
    "read a secret": lambda: open(SECRET).read(),
    "list its folder": lambda: os.listdir(os.path.dirname(SECRET)),
    "read users": lambda: open("/etc/shadow").read(),
    "read own source of the project": lambda: open(ROOT + "/README.md").read(),
    "link to a secret": lambda: (os.symlink(SECRET, "link"), open("link").read()),
    "hard link": lambda: os.link(SECRET, "hard"),
    "change a mode": lambda: os.chmod(SECRET, 0o777),
    "truncate": lambda: os.truncate(SECRET, 0),
    "write outside": lambda: write(SECRET),
    "write to tmp": lambda: write("/tmp/evil-PORT"),
    "write to the root": lambda: write("/evil"),
    "write beside": lambda: write("../evil"),
    "write to the interpreter": lambda: write(os.__file__),
    "write its own source": lambda: write(sys._getframe().f_code.co_filename),
    "memory of the caller": lambda: open(f"/proc/{CALLER}/mem", "rb").read(1),
    "environment of the caller": lambda: open(f"/proc/{CALLER}/environ", "rb").read(),
    "kill the caller": lambda: os.kill(CALLER, 9),
    "kill the parent": lambda: os.kill(os.getppid(), 9),
    "kill everything": lambda: os.kill(-1, 9),
    "stop the parent": lambda: os.kill(os.getppid(), 19),
    "limit the parent": lambda: __import__("resource").prlimit(os.getppid(), 0, (0, 0)),
    "trace the parent": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "become root": lambda: os.setuid(0),
    "raise a limit": lambda: __import__("resource").setrlimit(7, (4096, 4096)),
    "new user namespace": lambda: call("unshare", 0x10000000),
    "clone a namespace": lambda: call("syscall", 56 if os.uname().machine == "x86_64" else 220, 0x10000011, 0, 0, 0, 0),
    "mount": lambda: call("mount", b"none", b"/", b"tmpfs", 0, None),
    "chroot": lambda: os.chroot("."),
    "memory of nobody": lambda: os.memfd_create("x"),
    "import the project": lambda: __import__("examples.errors"),
    "import its ops": lambda: __import__("deepseek_ops"),
    "import torch": lambda: __import__("torch"),
    "import an installed package": lambda: __import__("pip"),
    "find its folder": lambda: (sys.path.insert(0, ROOT), __import__("examples")),
}
for name, attack in attacks.items():
    try:
        attack()
    except (OSError, ImportError, ValueError):
        continue
    print("SUCCEEDED:", name)
print(len(attacks), "tried")
"""


class Reached(Exception):
    """An attack has arrived at one of the servers."""


def _attacked(folder, run):
    """Run the attacks against two listening servers, a secret file and this process."""
    secret = folder / "secret.txt"
    secret.write_text("the answer is 42")
    secret.chmod(0o666)  # so that only the sandbox hides it
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        address = str(folder / "s")
        local.bind(address)
        os.chmod(address, 0o777)
        local.listen()
        for listening in (server, local):
            listening.settimeout(60)

            def accept(listening=listening):
                try:
                    accepted.append(listening.accept())
                except OSError:
                    return

            threading.Thread(target=accept, daemon=True).start()
        values = {
            "PORT": server.getsockname()[1],
            "UNIX": address,
            "SECRET": str(secret),
            "ROOT": str(ROOT),
            "CALLER": os.getpid(),
        }
        head = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        result = run(head + ATTACKS)
        for listening in (server, local):
            listening.shutdown(socket.SHUT_RDWR)
    if accepted:
        raise Reached(result)
    assert secret.read_text() == "the answer is 42" and secret.stat().st_mode & 0o777 == 0o666
    return result


def test_attacks_reach_nothing(level, open_folder):
    result = _attacked(open_folder, _sandbox(level).run)
    assert result.status == "ok", result
    assert result.stdout == "38 tried\n"


def test_namespaces_hold_alone(open_folder):
    """Without Landlock and the filter, as on a kernel that has neither: what succeeds reaches nothing but the program's own."""
    alone = _sandbox("namespaces")
    alone._beside = False
    result = _attacked(open_folder, alone.run)
    own = {"new user namespace", "clone a namespace", "memory of nobody", "kill the parent", "stop the parent",
           "limit the parent", "kill everything", "chroot"}  # fmt: skip
    *succeeded, tried = result.stdout.splitlines()
    assert result.status == "ok" and tried == "38 tried", result
    assert {line.removeprefix("SUCCEEDED: ") for line in succeeded} <= own


def test_the_attacks_work_without_a_sandbox(open_folder):
    """Those of the list that do no harm: so what stops them above is the sandbox."""
    harmless = ["network", "unix socket", "read a secret", "list its folder", "read own source of the project",
                "environment of the caller", "import the project"]  # fmt: skip

    def run(program):
        command = [
            sys.executable,
            "-c",
            program.replace("attacks.items()", f"((n, attacks[n]) for n in {harmless})"),
        ]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=200, check=False)
        return done.stdout.decode().splitlines()

    with pytest.raises(Reached) as reached:
        _attacked(open_folder, run)
    assert reached.value.args[0][:-1] == [f"SUCCEEDED: {name}" for name in harmless]


@pytest.mark.parametrize("level", ["namespaces", "landlock"])
def test_an_ordinary_user_is_protected_as_well(level, open_folder):
    """Root drops to a user without rights, who then runs the attacks in a sandbox of their own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    python = public_python()
    if python is None or not readable_by_all(ROOT):
        pytest.skip("no interpreter, or no checkout, that a user without rights can read")
    script = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import asdict
from examples.errors import UserError
from examples.rewards.sandbox import Limits, Sandbox
try:
    sandbox = Sandbox(Limits(wall_seconds=120, cpu_seconds=3, memory_mib=160, processes=6), level={level!r})
except UserError as error:
    print(json.dumps(str(error)))
else:
    forks = "import os, time\\nn = 0\\ntry:\\n  while n < 50:\\n    if os.fork() == 0: time.sleep(60)\\n    n += 1\\nexcept OSError: pass\\nprint(n)"
    results = [sandbox.run(sys.stdin.read()), sandbox.run(forks)]
    sandbox._beside = False  # the root file system is read-only by itself, though its owner is the program's user
    results.append(sandbox.run("for path in '/evil', '/program.py':\\n  try: print('written', open(path, 'w'))\\n  except OSError: pass"))
    print(json.dumps([asdict(result) for result in results]))
"""

    def run(program):
        command = [python, "-I", "-B", "-c", script]
        done = subprocess.run(
            command, input=program.encode(), capture_output=True, timeout=200, cwd="/", check=False, **NOBODY
        )
        assert done.returncode == 0, done.stderr.decode()
        answer = json.loads(done.stdout)
        if isinstance(answer, str):
            assert not kernel_allows(level, as_nobody=True), answer
            pytest.skip(answer)
        return [Result(**fields) for fields in answer]

    result, forks, root = _attacked(open_folder, run)
    assert (result.status, result.stdout) == ("ok", "38 tried\n"), result
    assert forks.status == "ok" and 3 <= int(forks.stdout) <= 7
    assert (root.status, root.stdout) == ("ok", "")


# --- limits --------------------------------------------------------------------------------------------------------


def test_a_fork_bomb_ends_and_leaves_nothing(level, name):
    program = _named(name) + "while True:\n  try: os.fork()\n  except OSError: pass"
    result = _sandbox(level, Limits(wall_seconds=120, cpu_seconds=0.5, memory_mib=300)).run(program)
    assert result.status == "timeout" and "processor time" in result.detail
    assert not _alive(name)


def test_processes_are_counted(level):
    program = (
        "import os, time\nn = 0\ntry:\n  while n < 60:\n    if os.fork() == 0: time.sleep(60)\n    n += 1\n"
    )
    program += "except BlockingIOError: print(n)"
    start = time.monotonic()
    result = _sandbox(level, Limits(wall_seconds=120, processes=8)).run(program)
    assert time.monotonic() - start < 100, result
    assert result.status == "ok" and 6 <= int(result.stdout) <= 8, result


def test_daemons_and_zombies_do_not_survive(level, name):
    """Double-forked, in a session of its own, deaf to every signal that can be ignored, holding stdout open."""
    program = _named(name) + textwrap.dedent("""
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        for _ in range(3):
            if os.fork() == 0:      # a zombie: nobody waits for it
                os._exit(0)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        time.sleep(0.2)
        print("left", flush=True)
    """)
    start = time.monotonic()
    result = _sandbox(level).run(program)
    assert (result.status, result.stdout) == ("ok", "left\n")
    assert time.monotonic() - start < 100
    assert not _alive(name)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor n in range(1, 32):\n  try: signal.signal(n, 1)\n  except OSError: pass\nwhile True: pass",
        "import os\nfor _ in range(3): os.fork()\nwhile True: pass",
    ],
)
def test_processor_time_is_limited(program):
    result = _sandbox(None, Limits(wall_seconds=120, cpu_seconds=0.5)).run(program)
    assert result.status == "timeout" and "processor time" in result.detail and result.exit_code is None
    assert 0.5 <= result.cpu_seconds < 3


def test_wall_time_is_limited(level, name):
    program = (
        _named(name) + "print('here', flush=True)\nos.kill(os.getpid(), 19)"
    )  # SIGSTOP: not even running
    result = _sandbox(level, Limits(wall_seconds=3.0)).run(program)
    assert result.status == "timeout" and result.detail == "ran longer than 3 s"
    assert result.stdout == "here\n"
    assert not _alive(name)


def test_memory_is_limited_alone_and_together(level):
    limited = _sandbox(level, Limits(wall_seconds=120, memory_mib=160))
    alone = (
        "kept = []\ntry:\n  while True: kept.append(bytearray(1 << 20))\nexcept MemoryError: print(len(kept))"
    )
    result = limited.run(alone)  # address space is refused, and the program may go on
    assert result.status == "ok" and 80 < int(result.stdout) < 160
    together = (
        "import os, time\nfor _ in range(5):\n  if os.fork() == 0: x = bytearray(60 << 20); time.sleep(60)\n"
    )
    result = limited.run(together + "time.sleep(60)")
    assert result.status == "memory" and result.seconds < 100


def test_output_is_cut_at_its_limit(level):
    limited = _sandbox(level, Limits(output_kib=8, wall_seconds=20))
    flood = limited.run("import sys\nwhile True: print('x' * 1000, file=sys.stderr)")
    assert flood.status == "output" and len(flood.stderr) == 8192 and flood.seconds < 100
    exact = limited.run("print('x' * 8191)")
    assert exact.status == "ok" and len(exact.stdout) == 8192
    assert limited.run("print('x' * 8192)").status == "output"


def test_files_are_limited():
    limited = _sandbox("namespaces", Limits(file_mib=2, folder_mib=3, open_files=20))
    program = """
        import errno, os
        def reason(action):
            try: action()
            except OSError as error: return errno.errorcode[error.errno]
        def fill(name, mib):
            with open(name, "wb") as file: file.write(b"x" * (mib << 20))
        print(reason(lambda: fill("a", 3)), reason(lambda: (fill("b", 1), fill("c", 1))),
              reason(lambda: [open("b") for _ in range(30)].clear()), reason(lambda: [open("b", "rb")] * 9))
    """
    result = limited.run(textwrap.dedent(program))
    assert result.stdout.split() == ["EFBIG", "ENOSPC", "EMFILE", "None"], result


def test_odd_folders_are_removed(open_folder, monkeypatch):
    """Too deep for Python's recursion, without modes, with links out of it: gone, and the links' targets unharmed."""
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(open_folder / "t"))
    (open_folder / "t").mkdir(mode=0o755)
    target = open_folder / "target"
    target.write_text("x")
    target.chmod(0o600)
    program = f"""
        import os
        for depth in range(1500):
            os.mkdir("d"); os.chdir("d")
        os.symlink({str(target)!r}, "link")
        os.fchmod(os.open(".", os.O_RDONLY), 0)
    """
    result = _sandbox("landlock").run(textwrap.dedent(program))
    assert result.status == "ok", result
    assert not list((open_folder / "t").iterdir())
    assert target.read_text() == "x" and target.stat().st_mode & 0o777 == 0o600


# --- the caller ----------------------------------------------------------------------------------------------------


def test_a_caller_that_dies_takes_the_program_with_it(level, name, open_folder):
    python = _sandbox(level)._python if level == "landlock" and os.geteuid() == 0 else None
    program = _named(name) + "os.fork()\nprint('x')\ntime.sleep(1000)"
    code = f"from examples.rewards.sandbox import *; Sandbox(level={level!r}, python={python!r}).run({program!r})"
    caller = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(open_folder)}
    )
    deadline = time.monotonic() + 100
    while len(_alive(name)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(_alive(name)) == 2
    caller.kill()
    caller.wait()
    while _alive(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(name)
    while list(open_folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(open_folder.iterdir())  # its folder has gone too


def test_eight_at_once(level):
    programs = [
        f"import time; time.sleep(0.3); open('f', 'w').write('{n}'); print(open('f').read())"
        for n in range(8)
    ]
    programs[3], programs[5] = "raise SystemExit(9)", "while True: pass"
    results = _sandbox(level, Limits(wall_seconds=120, cpu_seconds=0.5)).run_many(programs, workers=8)
    assert [r.status for r in results] == ["ok"] * 3 + ["error", "ok", "timeout", "ok", "ok"]
    assert [r.stdout.strip() for r in results] == ["0", "1", "2", "", "4", "", "6", "7"]
    assert max(r.seconds for r in results) < 100


# --- choice of the protection, and errors ----------------------------------------------------------------------------


def test_the_strongest_level_that_works_is_taken_and_named(monkeypatch):
    broken = {"namespaces"}

    def run(program, limits, level, python, readable):
        return (Result("ok"), None) if level not in broken else (Result("killed"), f"{level}: no")

    monkeypatch.setattr(sandbox, "_run", run)
    choose = sandbox._protection.__wrapped__
    found = choose(None, "python", ())
    assert found == Protection("landlock", {"namespaces": "namespaces: no"})
    assert str(found) == "landlock; not namespaces: namespaces: no"
    broken.add("landlock")
    with pytest.raises(UserError, match=r"namespaces: no; landlock: landlock: no\); level='limits'"):
        choose(None, "python", ())  # never a weaker one unasked
    assert choose("limits", "python", ()).level == "limits"


def test_limits_alone_still_limit():
    limited = Sandbox(Limits(wall_seconds=120, cpu_seconds=0.5), level="limits", python=public_python())
    assert limited.run("while True: pass").status == "timeout"
    assert limited.run("import socket; socket.socket()").detail.startswith("PermissionError")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Limits(wall_seconds=0), "limits.wall_seconds: must be positive; got 0"),
        (lambda: Limits(memory_mib=8), "limits.memory_mib: must be at least 64; got 8"),
        (
            lambda: Sandbox(level="docker"),
            "sandbox level: must be one of namespaces, landlock, limits; got 'docker'",
        ),
        (
            lambda: Sandbox(python="/no/python"),
            "sandbox python: must be a Python 3.11 or newer; got '/no/python'",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_program_too_large_is_an_error_of_the_program():
    result = _sandbox(None).run("#" * (sandbox.PROGRAM_BYTES + 1))
    assert result.status == "error" and "bytes" in result.detail
