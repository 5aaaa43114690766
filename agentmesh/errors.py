"""Every error agentmesh raises on purpose.

AgentmeshError
├── UsageError              the request is wrong; nothing ran                          exit code 2
│   ├── ConfigError         a YAML file: carries file, line, column, found, expected
│   ├── TopologyError       a graph that cannot be scheduled (cycle, unknown node, bad pattern)
│   ├── TemplateError       a prompt template that cannot be rendered
│   ├── NotFoundError       a name that is on no shelf; lists what exists
│   ├── InputError          run inputs that are missing, unknown, empty or undecodable
│   └── RequestTooLongError a prompt that can never fit the model's context or the memory budget
└── RunError                the request was fine, the run was not                      exit code 1
    ├── NodeError           one agent failed; carries node, round and cause
    ├── ModelError          weights that cannot be fetched, read, verified or run
    ├── RemoteError         an endpoint that cannot be reached, refuses a request or breaks off
    ├── UnsupportedModelError   a model whose attention agentmesh cannot serve
    ├── SharingError        KV that must be shared (`strict`, `deliver: kv`) cannot be
    ├── ReplicaError        a process with a copy of the model that died, or could not be started
    ├── SandboxError        code could not be started or contained
    └── RecordError         the run folder cannot be written (disk full, read-only)

A message says what was found, what was expected, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AgentmeshError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(AgentmeshError):
    """The request is wrong; nothing ran."""

    exit_code = 2


class ConfigError(UsageError):
    """A YAML file is wrong; the message starts with ``file:line:column``."""


class TopologyError(UsageError):
    """A graph cannot be scheduled."""


class TemplateError(UsageError):
    """A prompt template cannot be rendered."""


class NotFoundError(UsageError):
    """A name is on no shelf."""


class InputError(UsageError):
    """Run inputs are missing, unknown, empty or undecodable."""


class RequestTooLongError(UsageError):
    """A prompt can never fit the model's context or the memory budget."""


class RunError(AgentmeshError):
    """The request was fine, the run was not."""


class NodeError(RunError):
    """One agent failed.

    Attributes:
        node: name of the node.
        round: round in which it failed, from 0.
    """

    def __init__(self, message: str, *, node: str, round_: int) -> None:
        super().__init__(message)
        self.node = node
        self.round = round_


class ModelError(RunError):
    """Weights cannot be fetched, read, verified or run."""


class RemoteError(RunError):
    """An endpoint cannot be reached, refuses a request or breaks off."""


class UnsupportedModelError(RunError):
    """A model's attention is of a kind agentmesh cannot serve."""


class SharingError(RunError):
    """KV that must be shared cannot be."""


class ReplicaError(RunError):
    """A process with a copy of the model died, or could not be started."""


class SandboxError(RunError):
    """Code could not be started or contained."""


class RecordError(RunError):
    """The run folder cannot be written."""


def did_you_mean(found: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest choice, or an empty string."""
    close = difflib.get_close_matches(found, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def listing(choices: Iterable[str]) -> str:
    """The choices as ``a, b, c`` in order, for the end of an error message."""
    return ", ".join(sorted(choices)) or "(none)"
