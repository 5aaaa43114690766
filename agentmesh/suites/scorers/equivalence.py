"""The process in which formulas are compared: ``python -m agentmesh.suites.scorers.equivalence SECONDS``.

A formula that a model wrote can keep sympy busy for ever, inside one C call that no exception reaches. So a comparison
has a process of its own, which its parent kills: see ``worker``. One line of JSON comes in, one goes out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

READY = "ready"
MEMORY_BYTES = 2 * 2**30
GRACE_SECONDS = 5  # behind the parent's own limit: the alarm is for a parent that is gone


def parsed(text: str) -> list[Any]:
    """What math-verify reads in a text: a sympy object and the text it comes from, or either, or nothing."""
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    found: list[Any] = parse(text, targets, parsing_timeout=None)
    return found


def compare(gold: str, readings: Sequence[str]) -> dict[str, Any]:
    """Whether the first reading that holds a formula equals the gold one."""
    right = parsed(gold)
    found = next((each for reading in readings if (each := parsed(reading))), [])
    texts = [each for each in found if isinstance(each, str)]
    return {
        "equal": bool(found) and verify(right, found, timeout_seconds=None),
        "extracted": texts[0] if texts else "",
        "gold": bool(right),
        "found": bool(found),
    }


def confine() -> None:
    """Limits memory, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource  # noqa: PLC0415  # not everywhere

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def set_alarm(seconds: int) -> None:
    """Ends this process after so many seconds, whatever it does then; 0 takes the alarm back."""
    if sys.platform != "win32":
        signal.alarm(seconds)


def main() -> None:
    """Answers jobs until stdin is closed."""
    confine()
    logging.disable()  # math-verify warns that it has no time limit of its own
    limit = math.ceil(float(sys.argv[1])) + GRACE_SECONDS
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    print(READY, file=replies, flush=True)
    for line in sys.stdin:
        set_alarm(limit)
        print(json.dumps(compare(**json.loads(line))), file=replies, flush=True)
        set_alarm(0)


if __name__ == "__main__":
    main()
