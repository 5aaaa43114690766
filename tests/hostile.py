"""Hostile programs by name: what runs, the limits it runs under, and what must be seen of it where the sandbox holds.

In the texts, TOKEN marks the processes of one run, CANARY is a folder of the caller with a file in it, PORT a port that
the caller listens on, and SECRET_NAME the caller's environment variable.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Hostile:
    """One program.

    Attributes:
        text: the program, indented or not.
        says: what it prints where the sandbox holds; ``None`` where that is not to be said.
        ends: whether it reaches its last line; ``None`` where both are right.
        seconds: its time limit.
        limits: other limits.
        alone: nothing else of the same user may run beside it.
        needs_namespaces: without them what it says is not to be said.
        needs_apart: it is not to be run as the caller's own user among the caller's own processes.
    """

    text: str
    says: str | None = None
    ends: bool | None = False
    seconds: float = 6.0
    limits: dict[str, int] = field(default_factory=dict)
    alone: bool = False
    needs_namespaces: bool = False
    needs_apart: bool = False

    @property
    def code(self) -> str:
        """The program without what it is indented by in this file."""
        return textwrap.dedent(self.text).strip("\n")


def endless(text: str, *, alone: bool = False, needs_apart: bool = False, **limits: int) -> Hostile:
    """A program that goes on until it is ended."""
    return Hostile(text, seconds=0.8, limits=limits, alone=alone, needs_apart=needs_apart)


def refused(text: str, prologue: str, *, needs_namespaces: bool = False) -> Hostile:
    """A program of which no line may work; it says which did."""
    lines = "\n".join(f"trying({line!r})" for line in textwrap.dedent(text).strip().splitlines())
    return Hostile(f"{prologue}\n{TRYING}\n{lines}", says="", ends=True, needs_namespaces=needs_namespaces)


TRYING = """
def trying(line):
    try:
        exec(line, globals())
    except (OSError, ValueError, MemoryError, OverflowError):
        return
    print(line)
"""
LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
"""
SMALL = 2**28

RESOURCES = {
    "a fork bomb": endless(
        """
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
        """,
        alone=True,
        processes=8,
    ),
    "a fork bomb in sessions of their own": endless(
        """
        import os
        while True:
            try:
                if os.fork() == 0:
                    os.setsid()
            except OSError:
                pass
        """,
        alone=True,
        needs_apart=True,
        processes=8,
    ),
    "threads without end": endless(
        """
        import threading, time
        while True:
            try:
                threading.Thread(target=time.sleep, args=(60,)).start()
            except RuntimeError:
                time.sleep(0.1)
        """,
        alone=True,
    ),
    "a thread that never ends": Hostile(
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()
        """,
        ends=None,
        seconds=0.8,
    ),
    "memory at once": Hostile("block = b'x' * 2**32", limits={"memory_bytes": SMALL}),
    "memory bit by bit": Hostile(
        """
        held = []
        while True:
            held.append("x" * 10**6)
        """,
        limits={"memory_bytes": SMALL},
    ),
    "memory in many processes": Hostile(
        """
        import os, time
        for _ in range(7):
            if os.fork() == 0:
                break
        held = b"x" * (200 * 2**20)
        time.sleep(60)
        """,
        limits={"memory_bytes": SMALL, "processes": 8},
        alone=True,
    ),
    "memory that is mapped": Hostile(
        """
        import mmap
        held = [mmap.mmap(-1, 2**26) for _ in range(64)]
        for block in held:
            block.write(b"x" * 2**26)
        """,
        limits={"memory_bytes": SMALL},
    ),
    "a bomb of compressed data": Hostile(
        """
        import zlib
        packed = zlib.compress(bytes(2**20) * 64, 9)
        print(len(zlib.decompress(packed) * 64))
        """,
        limits={"memory_bytes": SMALL},
    ),
    "a regular expression without end": endless("import re; re.match('(a+)+$', 'a' * 60 + 'b')"),
    "a loop in C": endless("any(iter(int, 1))"),
    "a loop in C that ignores every signal": endless(
        """
        import signal
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        any(iter(int, 1))
        """
    ),
    "a number without end": endless("print(7 ** 7 ** 12)"),
    "a number too long to print": endless(
        """
        import sys
        getattr(sys, "set_int_max_str_digits", int)(0)
        print(10 ** (4 * 10**7))
        """
    ),
    "recursion without end": endless(
        """
        import sys
        sys.setrecursionlimit(10**9)
        def deeper(n):
            return deeper(n + 1) + 1
        deeper(0)
        """,
        memory_bytes=SMALL,
    ),
    "lists in lists": Hostile(
        """
        x = []
        for _ in range(10**6):
            x = [x]
        print(repr(x))
        """
    ),
    "output without end": Hostile("while True: print('x' * 10**4)"),
    "errors without end": Hostile("import sys\nwhile True: sys.stderr.write('x' * 10**4)"),
    "one line without end": Hostile("import os\nwhile True: os.write(1, b'x' * 10**6)"),
    "one file too large": Hostile("open('large', 'wb').write(bytes(10**8))"),
    "files that fill the disk": Hostile(
        """
        number = 0
        while True:
            number += 1
            open(f"f{number}", "wb").write(b"x" * 2**20)
        """,
        limits={"file_bytes": 2**22},
    ),
    "files without number": Hostile(
        """
        number = 0
        while True:
            number += 1
            open(str(number), "w").close()
        """
    ),
    "folders in each other": Hostile(
        """
        import os
        for _ in range(4000):
            os.mkdir("d")
            os.chdir("d")
        os._exit(0)
        """
    ),
    "open files without number": Hostile(
        """
        import os
        held = []
        try:
            while True:
                held.append(os.open("main.py", 0))
        except OSError:
            print(len(held) < 300)
        """,
        says="True\n",
        ends=True,
    ),
}

OUTSIDE = {
    "files of the caller": refused(
        """
        open('CANARY/kept').read()
        open('CANARY/kept', 'w')
        open('CANARY/new', 'w')
        os.remove('CANARY/kept')
        os.rename('CANARY/kept', 'mine')
        os.chmod('CANARY', 0o777)
        os.link('CANARY/kept', 'mine')
        """,
        "import os",
    ),
    "files of the system": refused(
        """
        open('/etc/passwd', 'a')
        open('/etc/shadow').read()
        open('/usr/bin/mark', 'w')
        open('/root/mark', 'w')
        open('/proc/sys/kernel/core_pattern', 'w')
        open('/sys/kernel/mark', 'w')
        """,
        "import os",
    ),
    "links out of the folder": Hostile(
        """
        import os
        os.symlink("CANARY", "out")
        os.symlink("CANARY/kept", "file")
        os.mkdir("closed")
        os.symlink("CANARY", "closed/out")
        os.chmod("closed", 0)
        os.chmod(".", 0)
        """,
        ends=None,
    ),
    "files left in open folders": Hostile(
        """
        import os
        for folder in ("/tmp", "/var/tmp", "/dev/shm"):
            try:
                os.mkdir(f"{folder}/TOKEN")
                open(f"{folder}/TOKEN/x", "w").write("x")
                os.symlink("CANARY", f"{folder}/TOKEN-link")
            except OSError:
                pass
        """,
        ends=True,
        needs_apart=True,
    ),
    "its own folder removed": Hostile(
        """
        import os, shutil
        shutil.rmtree(os.getcwd(), ignore_errors=True)
        """,
        ends=True,
    ),
    "its own folder made a link": Hostile(
        """
        import os
        here = os.getcwd()
        try:
            os.rename(here, here + "-TOKEN")
            os.symlink("CANARY", here)
        except OSError:
            pass
        """,
        ends=True,
        needs_apart=True,
    ),
    "devices": refused(
        """
        open('/dev/mem', 'rb')
        open('/dev/kmsg', 'rb')
        open('/dev/sda', 'rb')
        open('/dev/vda', 'rb')
        open('/dev/tty', 'rb')
        os.mknod('disk', 0o60666, os.makedev(254, 0))
        """,
        "import os",
    ),
    "a question to nobody": Hostile("print(input('name: '))", says="name: "),
    "the network": refused(
        """
        socket.create_connection(('127.0.0.1', PORT), timeout=2)
        socket.create_connection(('192.0.2.1', 80), timeout=0.5)
        socket.getaddrinfo('example.org', 80)
        socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
        socket.socket(17, socket.SOCK_RAW, 3)
        """,
        "import socket",
        needs_namespaces=True,
    ),
    "sockets of the caller": refused(
        """
        socket.socket(socket.AF_UNIX).connect('\\0TOKEN-abstract')
        socket.socket(socket.AF_UNIX).connect('CANARY/socket')
        """,
        "import socket",
        needs_namespaces=True,
    ),
    "the caller's environment": Hostile(
        """
        import glob, os
        print(dict(os.environ))
        for name in glob.glob("/proc/*/environ") + glob.glob("/proc/*/task/*/environ"):
            try:
                print(open(name, "rb").read())
            except OSError:
                pass
        """,
        ends=True,
        limits={"output_bytes": 2**22},
    ),
    "memory of other processes": refused(
        """
        open(f'/proc/{os.getppid()}/mem', 'rb')
        open(f'/proc/{os.getpid()}/mem', 'rb')
        open('/proc/thread-self/mem', 'rb')
        call('ptrace', 16, os.getppid(), 0, 0)
        call('ptrace', 0x4206, 1, 0, 0)
        """,
        LIBC,
    ),
    "a child that attaches to its parent": Hostile(
        LIBC
        + """
if os.fork() == 0:
    print(libc.ptrace(16, os.getppid(), 0, 0), flush=True)
    os._exit(0)
os.wait()
""",
        says="-1\n",
        ends=True,
    ),
    "limits put back": refused(
        """
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        resource.setrlimit(resource.RLIMIT_NPROC, (99999, 99999))
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))
        os.nice(-5)
        os.setuid(0)
        os.setgid(0)
        os.setgroups([0])
        """,
        "import os, resource",
    ),
    "a way up": refused(
        """
        call('mount', b'none', b'/proc', b'tmpfs', 0, None)
        call('chroot', b'.')
        call('umount2', b'/', 2)
        call('sethostname', b'x', 1)
        call('reboot', 0)
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        """,
        LIBC,
    ),
}

PROCESSES = {
    "its parent killed": Hostile(
        """
        import os
        os.kill(os.getppid(), 9)
        while True:
            pass
        """,
        seconds=0.8,
    ),
    "its parent stopped": endless(
        """
        import os, signal
        try:
            os.kill(os.getppid(), signal.SIGSTOP)
        except OSError:
            pass
        while True:
            pass
        """
    ),
    "everybody killed": endless(
        """
        import os
        try:
            os.kill(-1, 9)
        except OSError:
            pass
        while True:
            pass
        """,
        needs_apart=True,
    ),
    "its group killed": Hostile(
        """
        import os, signal
        os.killpg(0, signal.SIGTERM)
        os.killpg(0, 9)
        while True:
            pass
        """,
        seconds=0.8,
    ),
    "itself stopped": endless("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"),
    "signals caught": endless(
        """
        import signal
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, lambda *_: None)
        while True:
            pass
        """
    ),
    "a child that outlives it": Hostile(
        """
        import subprocess, sys
        subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)  # TOKEN"])
        """,
        ends=True,
    ),
    "a daemon, forked twice": Hostile(
        """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            os.chdir("/")
            os.closerange(0, 100)
            time.sleep(60)
            os._exit(0)
        """,
        ends=True,
    ),
    "daemons that flee": Hostile(
        """
        import os
        for _ in range(3):
            if os.fork() == 0:
                while True:
                    try:
                        if os.fork():
                            os._exit(0)
                        os.setsid()
                    except OSError:
                        pass
        """,
        ends=True,
        limits={"processes": 12},
        alone=True,
        needs_apart=True,
    ),
    "another program in its place": Hostile("import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'pass'])"),
    "a core dump": Hostile("import os; os.abort()"),
}

PRETENCE = {
    "sys.exit(0)": Hostile("import sys; sys.exit(0)"),
    "os._exit(0)": Hostile("import os; os._exit(0)"),
    "an exit in what is tested": Hostile(
        """
        def add(a, b):
            raise SystemExit(0)
        add(1, 2)
        """
    ),
    "an exception that nobody catches": Hostile(
        """
        class Quiet(BaseException):
            pass
        def add(a, b):
            raise Quiet
        add(1, 2)
        """
    ),
    "a parent that leaves its child": Hostile("import os\nif os.fork(): os._exit(0)"),
    "a copy that takes its parent's number": Hostile(
        """
        import os
        owner = os.getpid()
        if os.fork():
            os.wait()
            os._exit(0)
        os.getpid = lambda: owner
        """,
        ends=None,
    ),
    "words of success": Hostile(
        """
        import re
        words = re.findall("[0-9a-f]{32}", open("main.py").read())
        print("started", "passed", *words, sep="\\n")
        """,
        ends=None,
    ),
    "words of success into every pipe": Hostile(
        """
        import os, re
        words = re.findall("[0-9a-f]{32}", open("main.py").read())
        for number in range(1, 100):
            try:
                os.write(number, "\\n".join(["started", *words]).encode())
            except OSError:
                pass
        os._exit(0)
        """
    ),
    "other builtins": Hostile(
        """
        import builtins
        for name in ("exec", "compile", "all", "any", "isinstance", "abs", "len", "AssertionError"):
            setattr(builtins, name, lambda *a, **k: True)
        builtins.__build_class__ = None
        """,
        ends=None,
    ),
    "other exits": Hostile(
        """
        import atexit, os, sys
        sys.excepthook = lambda *_: os._exit(0)
        atexit.register(os._exit, 0)
        sys.exit = os._exit = print
        raise ValueError
        """
    ),
    "another check": Hostile(
        """
        def check(candidate):
            pass
        import sys
        sys.modules["__main__"].check = check
        """,
        ends=None,
    ),
    "a debugger that jumps over lines": Hostile(
        """
        import sys
        def jump(frame, event, _argument):
            if event == "line" and frame.f_code.co_filename.endswith(("main.py", "tests.py")):
                for line in range(frame.f_lineno + 40, frame.f_lineno, -1):
                    try:
                        frame.f_lineno = line
                        return jump
                    except ValueError:
                        pass
            return jump
        def arm():
            frame = sys._getframe()
            while frame is not None:
                frame.f_trace = jump
                frame = frame.f_back
            sys.settrace(jump)
        arm()
        def add(a, b):
            arm()
        """,
        ends=None,
    ),
    "frames rewritten": Hostile(
        """
        import sys
        nothing, frame = compile("", "nothing", "exec"), sys._getframe()
        while frame is not None:
            for names in (frame.f_locals, frame.f_globals):
                for name in {"tests", "check", "run", "exec", "judge", "step", "steps", "code"} & set(names):
                    names[name] = nothing if name in ("tests", "code") else lambda *a, **k: None
            try:
                import ctypes
                ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
            except Exception:
                pass
            frame = frame.f_back
        """,
        ends=None,
    ),
    "the seal from the garbage collector": Hostile(
        """
        import gc, os
        for found in gc.get_objects():
            if "partial" in type(found).__name__ and found.func.__name__ == "write":
                found()
        os._exit(0)
        """
    ),
    "the seal from frames": Hostile(
        """
        import gc, os, sys
        frame, found = sys._getframe(), []
        while frame is not None:
            found += [x for x in gc.get_referents(frame) if isinstance(x, (str, bytes)) and len(x) == 32]
            frame = frame.f_back
        print(found, flush=True)
        os._exit(0)
        """,
        says="[]\n",
    ),
    "an end that never comes": Hostile(
        """
        import sys
        class Last:
            def __del__(self):
                while True:
                    pass
        sys.kept = Last()
        """,
        ends=None,
        seconds=0.8,
    ),
    "work after the end": Hostile("import atexit, time; atexit.register(time.sleep, 60)", ends=None, seconds=0.8),
}

PROGRAMS = {**RESOURCES, **OUTSIDE, **PROCESSES, **PRETENCE}

# What test-based scoring cannot tell from a right solution: it runs to the end of the tests, and they find no fault.
KNOWN_LIMITS = {
    "a value that equals everything": """
class Yes:
    def __eq__(self, other):
        return True
def add(a, b):
    return Yes()
""",
    "a program that reads its tests": r"""
import re
texts = re.findall(r"candidate\((\d+), (\d+)\) == (\d+)", open("main.py").read())
known = {(int(a), int(b)): int(c) for a, b, c in texts}
def add(a, b):
    return known[a, b]
""",
}
