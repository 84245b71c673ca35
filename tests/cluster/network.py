"""Two nodes of a network on this machine: namespaces with addresses and names of their own, and a link."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("node-a", "node-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def hindrance() -> str:
    """Why this machine cannot have them; empty if it can."""
    if shutil.which("ip", path=_path()) is None:
        return "ip is not installed (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "they need root"
    made = subprocess.run(
        ["ip", "netns", "add", _space(2)], capture_output=True, text=True, env=_environment()
    )
    if made.returncode:
        return made.stderr.strip()
    _ip("netns", "del", _space(2))
    return ""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _path()}


def _space(node: int) -> str:
    return f"rcpo{os.getpid()}-{node}"


def _link(node: int) -> str:
    return f"rcpo{node}"


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=_environment()).stdout


class Network:
    """A context manager; `folder` holds the nodes' common hosts file."""

    def __init__(self, folder: Path) -> None:
        self._hosts = folder / "hosts"

    def __enter__(self) -> Network:
        names = [f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)]
        self._hosts.write_text("".join(["127.0.0.1 localhost\n", *names]))
        for node in (0, 1):
            _ip("netns", "add", _space(node))
            _ip("-n", _space(node), "link", "set", "lo", "up")
        peer = ["type", "veth", "peer", "name", _link(1), "netns", _space(1)]
        _ip("link", "add", _link(0), "netns", _space(0), *peer)
        for node in (0, 1):
            _ip("-n", _space(node), "addr", "add", f"{ADDRESSES[node]}/24", "dev", _link(node))
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        for node in (0, 1):
            _ip("netns", "del", _space(node))

    def clear(self) -> None:
        """Ends whatever runs on the nodes."""
        for node in (0, 1):
            while pids := _ip("netns", "pids", _space(node)).split():
                for pid in pids:
                    try:
                        os.kill(int(pid), signal.SIGKILL)
                    except ProcessLookupError:  # it left by itself
                        continue
                time.sleep(0.1)

    def cut(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        _ip("-n", _space(0), "link", "set", _link(0), "down")

    def heal(self) -> None:
        for node in (0, 1):
            _ip("-n", _space(node), "link", "set", _link(node), "up")

    def command(self, node: int, *words: str, first: str = "true") -> list[str]:
        """The command line that runs `words` on a node, after a line of shell of its own."""
        prepare = f'hostname {NAMES[node]} && mount --bind {self._hosts} /etc/hosts && {first} && exec "$@"'
        enter = ["ip", "netns", "exec", _space(node), "unshare", "--uts", "--mount"]
        return [*enter, "env", f"GLOO_SOCKET_IFNAME={_link(node)}", "sh", "-c", prepare, "sh", *words]

    def start(
        self, node: int, words: Sequence[str], cwd: Path, environment: Mapping[str, str], first: str = "true"
    ) -> Started:
        """Runs a command on a node; what it says goes to a file, so that it never waits for a reader."""
        command = self.command(node, *words, first=first)
        environment = {**environment, "PATH": environment["PATH"] + ":/usr/sbin:/sbin"}
        handle, name = tempfile.mkstemp(dir=self._hosts.parent, prefix=f"{NAMES[node]}-")
        with os.fdopen(handle, "w") as output:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        return Started(process, Path(name))


@dataclass(frozen=True)
class Started:
    """A command on a node."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    @property
    def words(self) -> str:
        return self.output.read_text(errors="replace")

    def end(self, seconds: float) -> int:
        """The exit code; fails, with what the command said, where it does not come to an end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {seconds:.0f} s: {self.words[-5000:]}") from None
