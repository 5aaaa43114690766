"""Starts one run, watches time and output, and ends it for certain; knows nothing about what contains it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator

from agentmesh.errors import SandboxError
from agentmesh.sandbox.launch import Launch, Plan, prepare
from agentmesh.sandbox.plans import choose_plan
from agentmesh.sandbox.values import CodeResult, Limits

CHUNK_BYTES = 2**16
GRACE_SECONDS = 2.0  # for the supervisor to end what the code started; it needs milliseconds


async def run_code(code: str, limits: Limits | None = None) -> CodeResult:
    """Runs ``code`` as a program of its own, in the strongest containment this machine allows.

    The code finds the standard library, an empty folder that is also its home, an empty stdin, no environment and
    no open files. Whatever it started is killed and the folder removed before this returns, also when cancelled.

    Raises:
        SandboxError: the code could not be started.
    """
    plan = await asyncio.to_thread(choose_plan)
    async with _prepared(plan, code, limits or Limits()) as launch:
        begun = time.perf_counter()
        try:
            process = await asyncio.create_subprocess_exec(
                *launch.command, stdin=PIPE, stdout=PIPE, stderr=PIPE, **launch.options()
            )
        except OSError as error:
            raise SandboxError(f"{launch.command[0]} could not be started: {error}; see `agentmesh doctor`") from error
        return await _watch(process, launch, limits or Limits(), begun)


@contextlib.asynccontextmanager
async def _prepared(plan: Plan, code: str, limits: Limits) -> AsyncIterator[Launch]:
    """One run's folder and pipe; removing thousands of files holds nobody up."""
    with contextlib.ExitStack() as stack:
        launch = stack.enter_context(prepare(plan, code, limits))
        try:
            yield launch
        finally:
            await asyncio.to_thread(stack.close)


async def _watch(process: Process, launch: Launch, limits: Limits, begun: float) -> CodeResult:
    out, err = _Output(limits.output_bytes), _Output(limits.output_bytes)
    timed_out = False
    try:
        await asyncio.wait_for(_to_end(process, launch, out, err), limits.time_s)
    except asyncio.TimeoutError:
        timed_out = True
    finally:
        await _stop(process)
    started, sealed = launch.report()
    if not started and not timed_out:
        raise SandboxError(
            f"the code could not be started: {err.text().strip() or f'exit code {process.returncode}'}\n"
            "Raise the limits if they are very low; `agentmesh doctor` shows what this machine allows."
        )
    truncated = out.full or err.full
    code = process.returncode
    return CodeResult(
        stdout=out.text(),
        stderr=err.text(),
        exit_code=None if code is None or timed_out or truncated else (code if code >= 0 else 128 - code),
        timed_out=timed_out,
        duration_s=time.perf_counter() - begun,
        truncated=truncated,
        completed=sealed and not timed_out and not truncated,
    )


class _Output:
    """The first bytes of one stream; lives as long as one run."""

    def __init__(self, limit: int) -> None:
        self.full = False
        self._limit = limit
        self._kept = bytearray()

    async def collect(self, stream: asyncio.StreamReader, process: Process) -> None:
        """Reads to the end; past the limit the run is ended and the rest thrown away."""
        while chunk := await stream.read(CHUNK_BYTES):
            self._kept += chunk[: self._limit - len(self._kept) + 1]
            if len(self._kept) > self._limit and not self.full:
                self.full = True
                _signal(process, signal.SIGTERM)

    def text(self) -> str:
        return self._kept[: self._limit].decode(errors="replace")


async def _to_end(process: Process, launch: Launch, out: _Output, err: _Output) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the report tells why it ended before reading
        process.stdin.write(launch.job)
        await process.stdin.drain()
    process.stdin.close()
    await asyncio.gather(out.collect(process.stdout, process), err.collect(process.stderr, process))
    await process.wait()


async def _stop(process: Process) -> None:
    """Asks the supervisor to end everything below it, then kills the process group in any case."""
    try:
        if process.returncode is None:
            _signal(process, signal.SIGTERM)
            await _gone(process)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(process.pid, signal.SIGKILL)
        await _gone(process)


async def _gone(process: Process) -> None:
    """Waits a while for the end, emptying the pipes so that they can close."""
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.gather(process.wait(), *(_drain(stream) for stream in streams)), GRACE_SECONDS)


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.read(CHUNK_BYTES):
        pass


def _signal(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
