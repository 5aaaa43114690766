"""The program that runs inside the new process; standard library only, given to ``python -c`` as text.

It reads one job (JSON) from stdin and becomes up to three processes:

    supervisor   stays outside; ends everything below it when the code ends, at SIGTERM, or where all of it together
                 takes too much
    init         only with namespaces: first process of the new process namespace; its end is the end of all others
    code         limits, other user, no privileges, then the code

A step that fails raises before the job's start mark is reported, so the caller can tell it from an error of the code.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

PROGRAM = "main.py"
LINUX = sys.platform == "linux"

# linux/sched.h
NEW_MOUNT, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 1 << 28, 1 << 29, 1 << 30
# linux/mount.h
READ_ONLY, NO_SUID, NO_DEVICE, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
DETACH = 2
# linux/prctl.h, linux/capability.h, linux/sockios.h
PARENT_DEATH_SIGNAL, DUMPABLE, SUBREAPER, NO_NEW_PRIVILEGES = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522
SET_INTERFACE_FLAGS, INTERFACE_UP = 0x8914, 1
OPEN_FILES = 256
ENTRIES, DEPTH = 4096, 100  # files and folders that one run may make, and folders in each other
LOOK_SECONDS = 0.05  # between two looks at what a run takes; longer where a look takes long


def libc(name: str, *arguments: Any) -> None:
    """Calls a C function that returns 0; anything else becomes an OSError that names it."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mounts ``source`` at ``target``; the arguments are those of the C function."""
    libc("mount", *(text.encode() for text in (source, target, kind)), ctypes.c_ulong(flags), options.encode())


# ---- supervisor ------------------------------------------------------------------------------------------------


def descendants() -> set[int]:
    """Process ids of everything below this process, orphans too: on Linux they come up to it (subreaper)."""
    parents = {}
    for entry in Path("/proc").iterdir() if LINUX else ():
        with contextlib.suppress(OSError, ValueError):
            stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found: set[int] = set()
    layer = {os.getpid()}
    while layer := {child for child, parent in parents.items() if parent in layer}:
        found |= layer
    return found


def end_user(user: int) -> None:
    """Kills all processes of the run's own user id at once, which no fork can outrun."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    try:
        os.setuid(user)
        os.kill(-1, signal.SIGKILL)
    finally:
        os._exit(0)


def sweep(user: int | None) -> None:
    """Kills everything below this process; stops all first, since a stopped process starts no other."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    if user is not None:
        end_user(user)
    stopped: set[int] = set()
    while fresh := descendants() - stopped:
        stopped |= fresh
        for process in fresh:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGSTOP)
    for process in stopped:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while LINUX:
            os.wait()


def wait_for(child: int) -> int:
    """The child's exit code, 128 + n for signal n; buries every other process that ends meanwhile."""
    ended, status = os.wait()
    while ended != child:
        ended, status = os.wait()
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def family(process: int) -> list[int]:
    """Process ids of everything below a process, by the kernel's own lists: cheaper than ``descendants``."""
    found, at = [process], 0
    while at < len(found):
        for task in Path(f"/proc/{found[at]}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text(encoding="ascii").split())
        at += 1
    return found[1:]


def memory_of(processes: list[int]) -> int:
    """Bytes of memory that processes hold and that no file stands behind; shared pages count for each."""
    pages = 0
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            _, resident, shared = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[:3]
            pages += int(resident) - int(shared)
    return pages * resource.getpagesize()


def overfull(folder: str, size: int) -> bool:
    """Whether a folder holds more than ``size`` bytes of the disk, ``ENTRIES`` entries or ``DEPTH`` levels."""
    used, entries, folders = 0, 0, [(folder, 0)]
    while folders:
        path, depth = folders.pop()
        if used > size or entries > ENTRIES or depth > DEPTH:
            return True
        with contextlib.suppress(OSError), os.scandir(path) as listing:
            for entry in listing:
                entries += 1
                with contextlib.suppress(OSError):
                    used += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append((entry.path, depth + 1))
    return used > size or entries > ENTRIES


def excess(job: dict[str, Any]) -> str:
    """What a run takes too much of; empty where it keeps its limits."""
    if memory_of(family(os.getpid())) > 2 * job["limits"]["RLIMIT_AS"]:
        return "memory"
    seen = not job["view"]  # a view that was made here has limits of its own, and cannot be looked into from outside
    return "disk" if seen and overfull(job["folder"], job["limits"]["RLIMIT_FSIZE"]) else ""


def supervise(child: int, user: int | None, job: dict[str, Any]) -> None:
    """Waits for the child, ends everything else and leaves with the child's exit code."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        sweep(user)
        os._exit(128 + signal.SIGTERM)

    def look(_signal: int, _frame: FrameType | None) -> None:
        begun = time.monotonic()
        if what := excess(job):
            sweep(user)
            os.write(2, f"ended by the sandbox: all processes and files together take too much {what}\n".encode())
            os._exit(128 + signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, max(LOOK_SECONDS, 5 * (time.monotonic() - begun)))

    signal.signal(signal.SIGTERM, stop)
    if LINUX:
        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_SECONDS)
    code = wait_for(child)
    sweep(user)
    os._exit(code)


# ---- namespaces ------------------------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """Moves to new namespaces; the next fork is the first process of the new process namespace."""
    user, group = os.getuid(), os.getgid()
    flags = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    libc("unshare", ctypes.c_int(flags if user == 0 else flags | NEW_USER))
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            Path("/proc/self", name).write_text(text, encoding="ascii")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:  # the code may talk to itself on its own loopback
        fcntl.ioctl(link, SET_INTERFACE_FLAGS, struct.pack("16sH22x", b"lo", INTERFACE_UP))


def build_view(base: Path, binds: list[str], size: int) -> None:
    """Makes ``base`` the root: ``binds`` read-only, /tmp and /dev/shm small and in memory, nothing else."""
    os.umask(0o022)
    libc("unshare", NEW_MOUNT)  # here and not in the supervisor, which goes on seeing the old /proc
    mount("none", "/", "none", RECURSIVE | PRIVATE)
    mount("tmpfs", str(base), "tmpfs", NO_SUID | NO_DEVICE, "mode=755,size=1m")
    for name in ("tmp", "dev/shm"):
        (base / name).mkdir(parents=True)
        mount("tmpfs", str(base / name), "tmpfs", NO_SUID | NO_DEVICE, f"mode=1777,size={size},nr_inodes={ENTRIES}")
    for path in binds:
        show(Path(path), base / path.lstrip("/"))
    (base / "proc").mkdir()
    with contextlib.suppress(PermissionError):  # some containers forbid it: the code then sees an empty /proc
        mount("proc", str(base / "proc"), "proc", NO_SUID | NO_DEVICE | NO_EXEC)
    protect(base)
    os.chdir(base)
    libc("pivot_root", b".", b".")  # the old root now lies on top of the new one
    libc("umount2", b".", DETACH)
    os.chdir("/")


def show(path: Path, target: Path) -> None:
    """Makes a link, folder or file of the old root appear at ``target``; what does not exist is passed over."""
    if not path.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    mount(str(path), str(target), "none", BIND | RECURSIVE)


def protect(base: Path) -> None:
    """Remounts everything below ``base`` read-only, mounts inside bound folders too; not /tmp, /proc and devices."""
    names = {"nosuid": NO_SUID, "nodev": NO_DEVICE, "noexec": NO_EXEC}
    spared = {base / "tmp", base / "proc"}
    for row in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields = row.split()
        point = Path(fields[4].encode().decode("unicode_escape"))  # a space is written \040
        if point.is_relative_to(base) and point not in spared and not point.is_relative_to(base / "dev"):
            kept = sum(names.get(option, 0) for option in {*fields[5].split(","), "nosuid", "nodev"})
            mount("none", str(point), "none", REMOUNT | BIND | READ_ONLY | kept)


# ---- code ------------------------------------------------------------------------------------------------------


def confine(limits: dict[str, int], user: int | None) -> None:
    """Resource limits, the other user, and no way back to privileges."""
    for name, value in {**limits, "RLIMIT_NOFILE": OPEN_FILES, "RLIMIT_CORE": 0}.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        capped = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(number, (capped, capped))
        except (ValueError, OSError):
            if LINUX:  # elsewhere some limits cannot be set, and the containment report says so
                raise
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if LINUX:
        header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
        libc("capset", header, nothing)
        libc("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        libc("prctl", DUMPABLE, 0, 0, 0, 0)  # nobody attaches to it or reads its memory, its own children neither


def print_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints a traceback from the code's own first frame on."""
    while trace is not None and trace.tb_frame.f_code.co_filename != PROGRAM:
        trace = trace.tb_next
    traceback.print_exception(kind, error, trace)


def run(job: dict[str, Any]) -> None:
    """Runs the code and then writes the seal, unless this is a copy of the process that the code forked."""
    Path(PROGRAM).write_bytes(job.pop("code").encode("utf-8", "surrogatepass"))
    owner, write, report = os.getpid(), os.write, os.dup(job["report"])  # the copy is not inherited by other programs
    os.close(job["report"])
    write(report, job["started"].encode())
    sys.excepthook = print_error
    sys.argv = [PROGRAM]

    def to_the_end() -> bytes:
        runpy.run_path(PROGRAM, run_name="__main__")
        if os.getpid() != owner:
            raise SystemExit
        return b""

    # The seal waits on the interpreter's stack: in no variable, and in nothing that the garbage collector lists.
    write(report, job.pop("seal").encode() + to_the_end())


def main() -> None:
    """Reads the job and becomes supervisor, init and code."""
    job = json.loads(sys.stdin.buffer.read())
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if LINUX:
        libc("prctl", PARENT_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
        libc("prctl", SUBREAPER, 1, 0, 0, 0)
    if job["namespaces"]:
        enter_namespaces()
        if child := os.fork():
            supervise(child, None, job)  # the end of init is the end of all
        libc("prctl", PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if job["view"]:
            build_view(Path(job["base"]), job["binds"], job["limits"]["RLIMIT_FSIZE"])
        if child := os.fork():
            os._exit(wait_for(child))
    elif child := os.fork():
        supervise(child, job["user"], job)
    os.environ.pop("PWD", None)  # bubblewrap sets it
    os.chdir(job["folder"])  # before the other user, who may not get through the folders above
    confine(job["limits"], job["user"])
    run(job)


if __name__ == "__main__":
    main()
