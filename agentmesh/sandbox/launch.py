"""Command line, folder and job of one run under a given plan; starts nothing itself."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from agentmesh.errors import SandboxError
from agentmesh.sandbox.values import Limits

STARTED = "started\n"  # in the report: all steps before the code itself went well
VIEW_FOLDER = "/tmp"  # noqa: S108 - in a file system view of its own
USERS = range(60_600, 61_100)  # ids that distributions leave free, below the 65,536 that containers map
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
OPEN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - they are only looked through
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


class Isolation(Enum):
    """What separates the code from the machine, strongest first."""

    BUBBLEWRAP = "bwrap"
    VIEW = "namespaces and own file system view"
    NAMESPACES = "namespaces"
    NONE = "none"


@dataclass(frozen=True)
class Plan:
    """One way of running code.

    Attributes:
        isolation: which namespaces are made, and by whom.
        other_user: run under a user id that is drawn for the run; needs root.
        interpreter: path of the Python to run.
        bwrap: path of bubblewrap, where it is used.
    """

    isolation: Isolation
    other_user: bool
    interpreter: str
    bwrap: str = ""

    @property
    def view(self) -> bool:
        """Whether the code has a file system view of its own."""
        return self.isolation in {Isolation.BUBBLEWRAP, Isolation.VIEW}


@dataclass(frozen=True)
class Launch:
    """One run, ready to start."""

    command: list[str]
    job: bytes
    environment: dict[str, str]
    seal: str
    report_in: int
    report_out: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments for both ways of starting a process."""
        return {"env": self.environment, "cwd": "/", "pass_fds": (self.report_out,), "start_new_session": True}

    def report(self) -> tuple[bool, bool]:
        """Whether the code was started, and whether it ran to its end; to be asked once, after the end."""
        try:
            text = os.read(self.report_in, 4096)
        except BlockingIOError:
            text = b""
        return text.startswith(STARTED.encode()), text == (STARTED + self.seal).encode()


@contextlib.contextmanager
def prepare(plan: Plan, code: str, limits: Limits) -> Iterator[Launch]:
    """Makes the folder and the report pipe of one run and removes both at the end."""
    with contextlib.ExitStack() as stack:
        base = tempfile.mkdtemp(prefix="agentmesh-")
        stack.callback(_remove, base)
        user = _take_user(stack) if plan.other_user else None
        if user is not None:
            os.chown(base, user, user)
            stack.callback(_remove_litter, user)
        report_in, report_out = os.pipe()
        stack.callback(os.close, report_in)
        stack.callback(os.close, report_out)
        os.set_blocking(report_in, False)
        folder, seal = VIEW_FOLDER if plan.view else base, secrets.token_hex(16)
        job = {
            "code": code,
            "started": STARTED,
            "seal": seal,
            "report": report_out,
            "folder": folder,
            "base": base,
            "user": user,
            "limits": _limits(limits, plan),
            "namespaces": plan.isolation in {Isolation.VIEW, Isolation.NAMESPACES},
            "view": plan.isolation is Isolation.VIEW,
            "binds": [*_readable(plan.interpreter), *DEVICES],
        }
        environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
        yield Launch(_command(plan, limits), json.dumps(job).encode(), environment, seal, report_in, report_out)


def _remove(path: str) -> None:
    """Removes a folder or file; links themselves and not what they lead to."""
    with contextlib.suppress(OSError, RecursionError):  # Python goes as deep into itself as folders lie in each other
        shutil.rmtree(path)
    if os.path.lexists(path):
        if os.getuid() != 0 and not Path(path).is_symlink():  # the code may have closed its folders
            subprocess.run(["chmod", "-R", "u+rwX", "--", path], check=False, capture_output=True)  # noqa: S603, S607
        subprocess.run(["rm", "-rf", "--", path], check=False, capture_output=True)  # noqa: S603, S607


def _remove_litter(user: int) -> None:
    """Removes what the code left in the folders that every user may write to."""
    for folder in (folder for folder in {*OPEN_FOLDERS, tempfile.gettempdir()} if Path(folder).is_dir()):
        for path in Path(folder).iterdir():
            with contextlib.suppress(FileNotFoundError):  # others come and go
                if path.lstat().st_uid == user:
                    _remove(str(path))


def _take_user(stack: contextlib.ExitStack) -> int:
    """A user id that no other run has: a socket name, which one process at a time can hold, stands for it."""
    for user in secrets.SystemRandom().sample(USERS, len(USERS)):
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f"\0agentmesh-user-{user}")
        except OSError:
            holder.close()
            continue
        stack.callback(holder.close)
        return user
    raise SandboxError(f"all {len(USERS)} user ids for sandboxed code are in use; lower the concurrency")


def _limits(limits: Limits, plan: Plan) -> dict[str, int]:
    """Limits by the names of the ``resource`` module."""
    values = {
        "RLIMIT_CPU": math.ceil(limits.time_s) + 1,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NPROC": limits.processes,
    }
    if not plan.other_user:  # the limit counts everything the user runs, the sandbox or not
        running = psutil.process_iter(["uids", "num_threads"])
        mine = (entry.info for entry in running if entry.info["uids"] and entry.info["uids"].real == os.getuid())
        values["RLIMIT_NPROC"] += sum(info["num_threads"] or 1 for info in mine)
    return values


def _command(plan: Plan, limits: Limits) -> list[str]:
    source = importlib.resources.files("agentmesh.sandbox").joinpath("bootstrap.py").read_text(encoding="utf-8")
    python = [plan.interpreter, "-I", "-S", "-B", "-u", "-X", "utf8", "-c", source]
    if plan.isolation is not Isolation.BUBBLEWRAP:
        return python
    shown = []
    for path in _readable(plan.interpreter):
        for parent in reversed(Path(path).parents[:-1]):  # bubblewrap would copy a home folder's closed mode
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind-try", path, path]
    if plan.other_user:  # root drops to the other user by itself; a user namespace would have only one id
        spaces = ["--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--cap-add", "ALL"]
    else:
        spaces = ["--unshare-all"]
    own = ["--proc", "/proc", "--dev", "/dev"]
    for path in (VIEW_FOLDER, "/dev/shm"):  # noqa: S108 - in the view
        own += ["--perms", "1777", "--size", str(limits.file_bytes), "--tmpfs", path]
    own += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
    return [plan.bwrap, *spaces, "--die-with-parent", "--new-session", *shown, *own, "--", *python]


def _readable(interpreter: str) -> list[str]:
    """Paths the code may read: the system's programs and libraries, and the interpreter's own folder."""
    prefix = Path(sys.base_prefix).resolve()
    own = interpreter == own_interpreter() and not any(prefix.is_relative_to(path) for path in SYSTEM)
    return [*SYSTEM, str(prefix)] if own else list(SYSTEM)


def own_interpreter() -> str:
    """Path of the running Python behind its virtual environment's links."""
    return str(Path(sys.executable).resolve())
