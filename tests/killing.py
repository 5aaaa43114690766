"""Processes that are killed, such as evaluations; every one is forked from a server that imported all."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agentmesh.evaluate.report import evaluate
from agentmesh.evaluate.subjects import Request

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["agentmesh.evaluate.report", "transformers.models.llama.modeling_llama"])
FILE_EVENTS = frozenset({"open", "os.rename", "os.truncate"})


def die_before(operation: int | None, folder: str, events: frozenset[str] = FILE_EVENTS) -> None:
    """Have this process killed right before a file operation under a folder, counted from here on."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in events and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if operation is not None:
        sys.addaudithook(watch)


def attempt(request: dict[str, Any], folder: str, operation: int | None) -> None:
    """Evaluate until done, or until right before the given file operation under ``folder``: there it is killed."""
    die_before(operation, folder)
    evaluate(Request(**request))


def killed(request: dict[str, Any], folder: Path, *, seconds: float | None, operation: int | None) -> bool:
    """Whether an attempt was killed, after so many seconds or before a file operation; it may be done before."""
    return was_killed(attempt, (request, str(folder), operation), seconds)


def was_killed(target: Callable[..., None], arguments: tuple[Any, ...], seconds: float | None) -> bool:
    """Whether a process was killed, after so many seconds or by itself; it may be done before."""
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    process.join(120 if seconds is None else seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
