"""Finds the strongest containment that works on this machine by trying it, and reports it."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from agentmesh.errors import SandboxError
from agentmesh.sandbox.launch import Isolation, Launch, Plan, own_interpreter, prepare
from agentmesh.sandbox.values import Limits, Measure

# A plan works where a program that needs the standard library, files and a child process runs to its end.
TRIAL = """
import decimal, json, multiprocessing, subprocess, sys, tempfile
with tempfile.TemporaryFile() as file:
    file.write(b"1")
subprocess.run([sys.executable, "-I", "-S", "-c", "import json"], check=True)
"""
TRIAL_SECONDS = 10.0


@functools.cache
def choose_plan() -> Plan:
    """The strongest plan that works here; the answer is kept, since a machine does not change under a run.

    Raises:
        SandboxError: this is no POSIX system, or no plan works.
    """
    if os.name != "posix":
        raise SandboxError(f"code cannot be contained on {sys.platform}; run on Linux or macOS, or in WSL")
    reasons = []
    for plan in _candidates():
        reason = _failure(plan)
        if reason is None:
            return plan
        reasons.append(f"{plan.isolation.value}, {plan.interpreter}: {reason}")
    raise SandboxError(
        "no way to run code works on this machine. Tried:\n  " + "\n  ".join(reasons) + "\n"
        f"Check that `{own_interpreter()} -I -S -c 'import json'` runs and that the temporary folder can be written."
    )


def containment() -> tuple[Measure, ...]:
    """What is contained on this machine and what is not, for people to read.

    Raises:
        SandboxError: code cannot be run here at all.
    """
    plan, linux = choose_plan(), sys.platform == "linux"
    apart = plan.isolation is not Isolation.NONE
    maker = "bubblewrap" if plan.isolation is Isolation.BUBBLEWRAP else "namespaces"
    foreign = "" if plan.interpreter == own_interpreter() else f"; runs {plan.interpreter}, which that user can read"
    killed = "all processes of the user id" if plan.other_user else "descendants; a process may still slip away"
    limited = linux and (plan.other_user or os.getuid() != 0)
    return (
        Measure(
            "other user id",
            plan.other_user,
            f"an unused id for each run{foreign}" if plan.other_user else f"runs as user id {os.getuid()}",
        ),
        Measure("no network", apart, f"own loopback only ({maker})" if apart else "the code can reach the network"),
        Measure(
            "own process namespace",
            apart,
            f"sees and signals only itself ({maker})" if apart else "sees the machine's other processes",
        ),
        Measure(
            "own file system view",
            plan.view,
            f"system and Python read-only, /tmp its own ({maker})"
            if plan.view
            else "reads what its user id can read" + ("" if plan.other_user else ", and writes what it can write"),
        ),
        Measure(
            "memory limit", linux, "address space of each process" if linux else f"{sys.platform} does not enforce it"
        ),
        Measure("process limit", limited, "for each user id" if limited else "not enforced for this user id"),
        Measure(
            "process-group kill",
            active=True,
            detail="everything in the namespace"
            if apart
            else (killed if linux else "a process in a session of its own stays"),
        ),
    )


def _candidates() -> Iterator[Plan]:
    """Every plan worth trying, strongest first."""
    linux = sys.platform == "linux"
    bwrap = shutil.which("bwrap") if linux else None
    kinds = list(Isolation) if linux else [Isolation.NONE]
    users = (True, False) if linux and os.getuid() == 0 else (False,)
    system = [path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if Path(path).exists()]
    interpreters = dict.fromkeys([own_interpreter(), *system])
    for kind, user, interpreter in itertools.product(kinds, users, interpreters):
        if kind is not Isolation.BUBBLEWRAP:
            yield Plan(kind, user, interpreter)
        elif bwrap is not None:
            yield Plan(kind, user, interpreter, bwrap)


def _failure(plan: Plan) -> str | None:
    """Why the plan does not work here; None where it does."""
    try:
        with prepare(plan, TRIAL, Limits(time_s=TRIAL_SECONDS)) as launch:
            return _try(launch)
    except subprocess.TimeoutExpired:
        return f"no answer within {TRIAL_SECONDS:g} s"
    except OSError as error:
        return str(error)


def _try(launch: Launch) -> str | None:
    done = subprocess.run(  # noqa: S603 - our own command line
        launch.command, input=launch.job, capture_output=True, check=False, timeout=TRIAL_SECONDS, **launch.options()
    )
    if launch.report()[1]:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"ended with exit code {done.returncode} and no message"
