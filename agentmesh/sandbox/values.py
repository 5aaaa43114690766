"""What goes into a sandbox run and what comes out: limits, result, and the report of what is contained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from agentmesh.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """How much one run may use.

    Attributes:
        time_s: wall-clock seconds, the start of the interpreter included.
        memory_bytes: address space of each process; all of them together are ended where they hold twice as much
            memory.
        output_bytes: bytes kept of stdout, and of stderr; the run is ended where either gets longer.
        file_bytes: size of the largest file, and of all files together.
        processes: processes and threads at one time.
    """

    time_s: float = 10.0
    memory_bytes: int = 2**30
    output_bytes: int = 64 * 2**10
    file_bytes: int = 16 * 2**20
    processes: int = 32

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value <= 0:
                raise UsageError(f"sandbox limit {name} is {value}, expected a number above 0")


@dataclass(frozen=True)
class CodeResult:
    """What one run did.

    Attributes:
        stdout: what the code printed, cut at ``Limits.output_bytes``.
        stderr: the same for errors; a traceback starts at the code's own first frame.
        exit_code: as a shell reports it (128 + n for signal n); None where the sandbox ended the run.
        timed_out: the time limit ended the run.
        duration_s: seconds from start to end.
        truncated: the output limit ended the run.
        completed: the last line of the code was passed, shown by a random seal that is written after it: leaving
            early with ``sys.exit(0)`` or ``os._exit(0)`` does not count. The seal lies in the same process as the
            code, on the interpreter's stack, where neither variables nor the garbage collector lead to it: code that
            reads its own memory byte by byte can forge it.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    timed_out: bool
    duration_s: float
    truncated: bool
    completed: bool


@dataclass(frozen=True)
class Measure:
    """One containment measure and whether it is in force on this machine."""

    name: str
    active: bool
    detail: str
