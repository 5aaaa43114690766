"""Evaluations in processes of their own that are killed; every attempt is forked from a server that imported all."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agentmesh.evaluate.report import evaluate
from agentmesh.evaluate.subjects import Request

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["agentmesh.evaluate.report", "transformers.models.llama.modeling_llama"])
FILE_EVENTS = frozenset({"open", "os.rename", "os.truncate"})


def attempt(request: dict[str, Any], folder: str, operation: int | None) -> None:
    """Evaluate until done, or until right before the given file operation under ``folder``: there it is killed."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    if operation is not None:
        sys.addaudithook(watch)
    evaluate(Request(**request))


def killed(request: dict[str, Any], folder: Path, *, seconds: float | None, operation: int | None) -> bool:
    """Whether an attempt was killed, after so many seconds or before a file operation; it may be done before."""
    process = SERVER.Process(target=attempt, args=(request, str(folder), operation))
    process.start()
    process.join(120 if seconds is None else seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
