"""Owns the process in which formulas are compared: starts it late, keeps it, kills it when it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from agentmesh.errors import RunError

PROGRAM = "agentmesh.suites.scorers.equivalence"
START_SECONDS = 60.0


@dataclass(frozen=True)
class Comparison:
    """What came of one comparison.

    Attributes:
        equal: the formulas are equivalent.
        extracted: the formula's text as math-verify read it.
        note: why nothing was compared; empty where something was.
    """

    equal: bool = False
    extracted: str = ""
    note: str = ""


class Worker:
    """One process at a time, one comparison at a time; a thread of its own waits for it.

    Args:
        limit_s: seconds for one comparison; the start of the process does not count.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._thread: ThreadPoolExecutor | None = None
        self._process: subprocess.Popen[str] | None = None

    async def compare(self, gold: str, readings: Sequence[str]) -> Comparison:
        """Compares a formula, given by texts to look for it in, with the gold one.

        Raises:
            RunError: the process cannot be started.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "math-verify")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compare, gold, list(readings))

    def close(self) -> None:
        """Ends the process, also in the middle of a comparison."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            if (process := self._process) is not None:
                process.kill()
            self._thread.shutdown()
            self._thread = None
            self._drop()

    def _compare(self, gold: str, readings: list[str]) -> Comparison:
        if self._process is not None and self._process.poll() is not None:
            self._drop()  # something else has ended it since the last comparison
        process = self._process or self._start()
        reply, late = self._ask(process, json.dumps({"gold": gold, "readings": readings}), self._limit_s)
        if late or not reply:
            self._drop()
            why = f"stopped after {self._limit_s:g} s" if late else "the comparison ended its process"
            return Comparison(note=why)
        found = json.loads(reply)
        if not found["gold"]:
            return Comparison(extracted=found["extracted"], note=f"the sample's answer is no formula: {gold!r}")
        return Comparison(found["equal"], found["extracted"], "" if found["found"] else "no formula in the answer")

    def _start(self) -> subprocess.Popen[str]:
        places = os.pathsep.join(place for place in sys.path if place)
        self._process = process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", PROGRAM, str(self._limit_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": places},
        )
        if not self._ask(process, "", START_SECONDS)[0]:
            self._drop()
            raise RunError(
                f"the process that compares formulas could not be started (exit code {process.returncode}); "
                f"`{sys.executable} -m {PROGRAM} 10` shows why"
            )
        return process

    def _ask(self, process: subprocess.Popen[str], line: str, limit_s: float) -> tuple[str, bool]:
        """The next line of the process's output, and whether it was killed because that took too long."""
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended: then there is no reply either
                if line:
                    print(line, file=process.stdin, flush=True)
            reply = process.stdout.readline()
        finally:
            timer.cancel()
            timer.join()
        return reply, late.is_set()

    def _drop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(BrokenPipeError), process:  # what it did not read is lost with it
                process.kill()
