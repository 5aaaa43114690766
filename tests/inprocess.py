"""The command line inside the test's own process, which has imported torch already; starting Python takes seconds."""

from __future__ import annotations

import os
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from subprocess import CompletedProcess

from agentmesh.cli import invoke


def command(*arguments: object, cwd: Path) -> CompletedProcess[str]:
    """What a command says and its exit code, run in the folder ``cwd``; `test_cli.py` starts processes."""
    words, before, out, err = [*map(str, arguments)], Path.cwd(), StringIO(), StringIO()
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = invoke(words)
    finally:
        os.chdir(before)
    return CompletedProcess(words, code, out.getvalue(), err.getvalue())
