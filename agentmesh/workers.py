"""From a blueprint's members to working agents."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agentmesh.agents.base import Agent, FunctionAgent
from agentmesh.agents.llm import LlmAgent
from agentmesh.agents.vote import VoteAgent
from agentmesh.blueprint import Blueprint, Member
from agentmesh.config.mesh import (
    AgentBase,
    CustomAgentSpec,
    LlmAgentSpec,
    Memory,
    PythonAgentSpec,
    RetrieverAgentSpec,
    VoteAgentSpec,
)
from agentmesh.config.topology import PythonRef
from agentmesh.errors import NotFoundError, did_you_mean, listing
from agentmesh.prompt import ContentKind, Message
from agentmesh.scheduler import Worker


def _retriever(spec: RetrieverAgentSpec, folder: Path) -> Agent:
    from agentmesh.agents.retriever import RetrieverAgent  # noqa: PLC0415  # bm25s is slow to import

    return RetrieverAgent(spec, folder)


def _python(spec: PythonAgentSpec, _folder: Path) -> Agent:
    from agentmesh.agents.python import PythonAgent  # noqa: PLC0415  # the sandbox probes the machine

    return PythonAgent(spec)


def _custom(spec: CustomAgentSpec, folder: Path) -> Agent:
    found = resolve(spec.python, folder)
    if isinstance(found, FunctionAgent):
        return found
    if isinstance(found, type) and issubclass(found, Agent):
        made: Agent = found(**spec.options)
        return made
    raise NotFoundError(
        f"{spec.python} is {type(found).__name__}, no agent; expected a subclass of agentmesh.Agent, "
        "or a function under @agentmesh.agent"
    )


KINDS: dict[type[AgentBase], tuple[Callable[[Any, Path], Agent], ContentKind]] = {
    LlmAgentSpec: (lambda spec, _folder: LlmAgent(spec), ContentKind.MESSAGE),
    PythonAgentSpec: (_python, ContentKind.RESULT),
    VoteAgentSpec: (lambda spec, _folder: VoteAgent(spec), ContentKind.MESSAGE),
    RetrieverAgentSpec: (_retriever, ContentKind.DOCUMENT),
    CustomAgentSpec: (_custom, ContentKind.MESSAGE),
}
"""Specification → how its agent is made, and what its text is to its readers."""


def make_workers(blueprint: Blueprint) -> dict[str, Worker]:
    """Node → worker; nodes of one group share nothing.

    Raises:
        NotFoundError: a Python reference that leads nowhere.
        InputError: a retriever's documents cannot be read.
    """
    return {node: _worker(blueprint, member) for node, member in blueprint.members.items()}


def _worker(blueprint: Blueprint, member: Member) -> Worker:
    run = blueprint.run
    if member.spec is None:
        assert member.agent is not None, "a member has a specification or an object"
        return Worker(member.agent, member.role, run.retry, run.timeout, judge=member.is_judge)
    make, kind = KINDS[type(member.spec)]
    retry = run.retry if member.spec.retry is None else member.spec.retry
    timeout = run.timeout if member.spec.timeout is None else member.spec.timeout
    remembers = isinstance(member.spec, LlmAgentSpec) and member.spec.memory is Memory.CONVERSATION
    return Worker(
        make(member.spec, blueprint.folder),
        member.role,
        retry,
        timeout,
        kind,
        member.reads_exactly,
        remembers,
        member.is_judge,
    )


def predicates(blueprint: Blueprint) -> Mapping[str, Callable[[Message], bool]]:
    """Edge conditions written in Python, by reference."""
    references = {edge.condition.python for edge in blueprint.topology.edges if isinstance(edge.condition, PythonRef)}
    return {reference: resolve(reference, blueprint.folder) for reference in sorted(references)}


def resolve(reference: str, folder: Path) -> Any:
    """The object that ``package.module:Name`` names; modules beside the mesh file are found, too.

    Raises:
        NotFoundError: no such module or name.
    """
    module_name, _, path = reference.partition(":")
    try:
        with _importable(folder):
            found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise NotFoundError(
            f"{reference}: cannot import {module_name!r} ({error}); it must lie beside the mesh file, in the working "
            "folder, or be installed"
        ) from error
    for part in path.split("."):
        names = vars(found)
        if part not in names:
            public = [name for name in names if not name.startswith("_")]
            hint = did_you_mean(part, public)
            raise NotFoundError(f"{reference}: {module_name} has no {part!r}; it has {listing(public)}.{hint}")
        found = names[part]
    return found


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder and of the working folder be imported, for the time of the import."""
    added = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)
