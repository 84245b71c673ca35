"""Python processes forked from one that has imported everything: a start takes milliseconds, not seconds.

`Popen` and `run` stand in for those of `subprocess` where the command is `[sys.executable, ...]` or `rcpo`.
Processes that such a process starts in the same way, ranks among them, are forked from a copy that has run
nothing yet. All are children of who started them, with signals, sessions, pipes, and exit codes.

What only a start of its own shows, test with `subprocess`: what importing takes, how the console is set up,
another hash seed in each process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import logging
import multiprocessing.util
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from itertools import takewhile
from pathlib import Path
from typing import Any

# what most commands import sooner or later; none of it starts a thread or asks where it runs
IMPORTED = [
    # first, as pydantic, which both use, looks through all modules that are there for each of their classes
    *("wandb", "wandb.sdk.launch.inputs.internal"),
    *("rcpo.cli", "rcpo.commands.train", "rcpo.commands.sweep", "rcpo.commands.data", "rcpo.commands.report"),
    *("rcpo.commands.plan", "rcpo.launch.run", "rcpo.training.trainer", "rcpo.onpolicy.rounds"),
    *("rcpo.evaluation.run", "rcpo.evaluation.heldout", "rcpo.evaluation.probes"),
    *("rcpo.commands.evaluate", "rcpo.commands.completion", "rcpo.report.card"),
    *("matplotlib.backends.backend_agg", "requests"),
    *("torch.distributed.launcher.api", "transformers.models.llama.modeling_llama", "datasets", "peft"),
    *("deepspeed", "hydra", "psutil"),
    str(Path(__file__).with_name("prepared.py")),
]
# what pytest's workers have besides
OF_WORKERS = ["hypothesis", "trl", str(Path(__file__).with_name("rewritten.py"))]
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
_OPTIONS = ("-P", "-u")  # the interpreter's that a fork can have: no folder of its own in the path, no buffer
_LENT = "RCPO_FORKED"  # the variable with the descriptor of a worker's forking process
_original = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class Server:
    """The near end of a process that forks, on request, children of this one."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.lock = threading.Lock()

    def start(self, request: dict[str, Any], descriptors: Sequence[int]) -> int:
        """The id of a new child of this process that has these as its standard input, output, and error."""
        payload = pickle.dumps(request | {"parent": os.getpid()})
        with self.lock, _adopting():
            socket.send_fds(self.channel, [len(payload).to_bytes(8, "big")], list(descriptors))
            self.channel.sendall(payload)
            return int.from_bytes(_exactly(self.channel, 8), "big")

    def execute_child(
        self, process: subprocess.Popen[Any], *values: Any, lends: bool = False, **named: Any
    ) -> None:
        """What `Popen._execute_child` does, for a command that `_runs_python` takes.

        A process that is lent its own forking process starts others with `subprocess` as usual.
        """
        given = _original.bind(process, *values, **named).arguments
        request = {
            "words": given["args"],
            "lends": lends,
            "preexec": given["preexec_fn"],
            "session": given["start_new_session"],
            "cwd": os.fspath(given["cwd"] or os.getcwd()),
            "environment": dict(os.environ if given["env"] is None else given["env"]),
        }
        ends = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        process.pid = self.start(request, [own if end == -1 else end for own, end in enumerate(ends)])
        process._child_created = True  # type: ignore[attr-defined]
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        process._close_pipe_fds(*(given[name] for name in pipes))  # type: ignore[attr-defined]


@contextlib.contextmanager
def _adopting() -> Any:
    """While it lasts, this process becomes the parent of its descendants that lose theirs."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_SUBREAPER, 0, 0, 0, 0)


def _exactly(channel: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = channel.recv(count - len(found))
        if not part:
            raise EOFError("the forking process has ended")
        found += part
    return found


def _runs_python(words: Any) -> bool:
    """Whether this interpreter runs a module, a program, or a script, with no options but _OPTIONS."""
    if isinstance(words, str | bytes | os.PathLike) or len(words) < 1:
        return False
    program, *rest = map(os.fspath, words)
    if program == sys.executable:
        while rest and rest[0] in _OPTIONS:
            del rest[0]
        return len(rest) > 0 and (rest[0] in ("-m", "-c") or rest[0].endswith(".py"))
    return program == str(Path(sys.executable).with_name("rcpo"))


# --- the process that forks ----------------------------------------------------------------------------


def serve(channel: socket.socket) -> None:
    """Forks a child of who asks for each request, until the other end is closed; never returns."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they may come for the whole group
    while True:
        header, descriptors, *_ = socket.recv_fds(channel, 8, 3)
        if not header:
            os._exit(0)
        payload = _exactly(channel, int.from_bytes(header, "big"))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(writing, child.to_bytes(8, "big"))
                os._exit(0)
            _become(channel, pickle.loads(payload), descriptors)
        os.waitpid(between, 0)  # its child is now that of the process that asked
        channel.sendall(os.read(reading, 8))
        for descriptor in (reading, writing, *descriptors):
            os.close(descriptor)


def _become(channel: socket.socket, request: dict[str, Any], descriptors: Sequence[int]) -> None:
    """Turns this process into the one that a request describes; never returns."""
    channel.close()
    while os.getppid() != request["parent"]:
        if os.getppid() == 1:
            os._exit(1)
        time.sleep(0.0005)
    if request["session"]:
        os.setsid()
    near, far = socket.socketpair()
    helper = os.fork()
    if helper == 0:  # has imported everything and run nothing: this process's own children come from it
        near.close()
        _only(far.fileno())
        serve(far)
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
    _only(near.fileno())
    if not request["lends"]:
        _fork_from(Server(near))
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) is signal.SIG_IGN and number not in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update({os.fsdecode(key): os.fsdecode(value) for key, value in request["environment"].items()})
    if request["lends"]:
        os.environ[_LENT] = str(near.fileno())
    os.chdir(request["cwd"])
    if request["preexec"] is not None:
        request["preexec"]()
    atexit._clear()
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)
    code = _exit_code(lambda: _run(list(map(os.fspath, request["words"]))))
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    near.close()
    os.waitpid(helper, 0)
    os._exit(code)


def _only(kept: int) -> None:
    """Closes all descriptors but the standard ones and one."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _fork_from(server: Server, lends: bool = False) -> None:
    """Lets this process's `subprocess.Popen` fork what it can."""
    execute = subprocess.Popen._execute_child  # type: ignore[attr-defined]

    @wraps(execute)
    def either(process: subprocess.Popen[Any], args: Any, *values: Any, **named: Any) -> None:
        if _runs_python(args):
            server.execute_child(process, args, *values, lends=lends, **named)
        else:
            execute(process, args, *values, **named)

    subprocess.Popen._execute_child = either  # type: ignore[attr-defined]


def _exit_code(work: Callable[[], None]) -> int:
    try:
        work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 — the interpreter's own last resort
        traceback.print_exc()
        return 1
    return 0


def _run(words: list[str]) -> None:
    """What the interpreter does with these words."""
    if words[0] != sys.executable:  # an installed program, which finds nothing in the current folder
        words = [sys.executable, "-P", "-m", "rcpo", *words[1:]]
    options = set(takewhile(_OPTIONS.__contains__, words[1:]))
    kind, *rest = words[1 + len(options) :]
    if "-u" in options:
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    first = os.getcwd() if kind in ("-m", "-c") else str(Path(kind).resolve().parent)
    if "-P" in options:
        first = ""
    entries = [first, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:0] = [entry for entry in entries if entry]
    if kind == "-m":
        sys.argv = rest
        if not hasattr(sys.modules.get(rest[0]), "__path__"):
            sys.modules.pop(rest[0], None)  # runpy warns of a module that was imported before it runs
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


# --- for tests -----------------------------------------------------------------------------------------


_processes: list[subprocess.Popen[bytes]] = []  # kept, so that their pipes stay open
_lent = os.environ.pop(_LENT, None)  # a worker's, whose children find nothing of it


def fork_workers() -> None:
    """Forks the Python processes that `subprocess` starts, and lends each a forking process of its own.

    All share what one process has imported, and start in no time.
    """
    _fork_from(_started(OF_WORKERS, subprocess.Popen), lends=True)


@cache
def _server(imports: tuple[str, ...]) -> Server:
    if _lent is not None and not imports:
        return Server(socket.socket(fileno=int(_lent)))
    return _started(imports, Popen if imports else subprocess.Popen)  # one with more is forked from the first


def _started(imports: Sequence[str], start: type[subprocess.Popen[bytes]]) -> Server:
    near, far = socket.socketpair()
    # pipes, as what its children's output goes to may have no positions
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [sys.executable, str(Path(__file__)), *IMPORTED, *imports]
    _processes.append(start(words, stdin=far, **pipes))  # type: ignore[call-overload]
    far.close()
    return Server(near)


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` of a Python program, forked; `imports` are modules or files to run beforehand."""

    def __init__(self, *given: Any, imports: Sequence[str] = (), **named: Any) -> None:
        self._imports = tuple(imports)
        super().__init__(*given, **named)

    def _execute_child(self, args: Any, *values: Any, **named: Any) -> None:
        assert _runs_python(args), f"{args} cannot be forked: use subprocess"
        _server(self._imports).execute_child(self, args, *values, **named)


def run(
    words: Sequence[str | Path],
    *,
    imports: Sequence[str] = (),
    timeout: float | None = None,
    check: bool = False,
    **named: Any,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(words, capture_output=True, text=True)`, forked; a process out of time is ended."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with Popen(words, imports=imports, **pipes, **named) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(list(map(str, words)), process.returncode, out, err)
    assert not check or done.returncode == 0, (done.args, done.returncode, out, err)
    return done


def rcpo(
    words: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """What `rcpo WORDS` prints in a folder, and its exit code."""
    command = [Path(sys.executable).with_name("rcpo"), *words]
    return run(command, cwd=cwd, env=dict(environment), timeout=timeout)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # tests of what is not installed are skipped
            runpy.run_path(name) if name.endswith(".py") else importlib.import_module(name)
    gc.freeze()
    from_parent = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    serve(from_parent)
