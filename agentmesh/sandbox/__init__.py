"""Runs Python code that a language model wrote, in a process contained as well as the machine allows.

    values      what goes in and comes out: limits, result, measures
    bootstrap   the program that runs inside the new process: namespaces, limits, other user, then the code
    launch      command line, folder and job of one run
    plans       which containment works here, found by trying
    runner      starts, watches and ends one run
    blocks      the code block in a model's message

Linux gives the most: own user id (as root), own network, process and file system namespaces. Elsewhere limits, a
fresh folder and an empty environment remain; ``containment`` says which. This is no virtual machine: the kernel
is shared, and code that attacks it may get out. Without another user id and without namespaces the code can do what
its caller can: read and write the caller's files, kill the caller's processes, and leave some of its own behind.
"""

from __future__ import annotations

from agentmesh.sandbox.blocks import last_code_block
from agentmesh.sandbox.plans import containment
from agentmesh.sandbox.runner import run_code
from agentmesh.sandbox.values import CodeResult, Limits, Measure

__all__ = ["CodeResult", "Limits", "Measure", "containment", "last_code_block", "run_code"]
