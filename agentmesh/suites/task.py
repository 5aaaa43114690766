"""``task.yaml``: what a suite is about, where its samples come from, and how answers are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from agentmesh import library
from agentmesh.config.base import Choice, Frozen
from agentmesh.config.load import load_file
from agentmesh.errors import did_you_mean, listing

SCORERS = ("gsm8k", "math", "choice", "has_answer", "qa", "recall", "code")
"""Names of scorers; ``suites.scorers.SCORERS`` holds them."""


class Kind(Choice):
    """What a sample holds besides ``question`` and ``answer``."""

    MATH = "math"
    """Nothing more."""

    CHOICE = "choice"
    """``choices``; the answer is a letter."""

    RAG = "rag"
    """``context``: passages, some of which hold the answer."""

    CODE = "code"
    """``tests`` and mostly ``entry_point``; ``visible`` tests may be shown to agents."""


NEEDED = {
    Kind.MATH: ("question", "answer"),
    Kind.CHOICE: ("question", "answer", "choices"),
    Kind.RAG: ("question", "answer", "context"),
    Kind.CODE: ("question", "tests"),
}
"""Fields that a sample of each kind must have."""


class Fields(Frozen):
    """Where each field stands in a row: keys and list indices, separated by dots, such as ``meta.test_list.0``."""

    id: str = "id"
    question: str = "question"
    answer: str = "answer"
    answers: str = "answers"
    context: str = "context"
    gold: str = "gold"
    choices: str = "choices"
    entry_point: str = "entry_point"
    tests: str = "tests"
    visible: str = "visible"


class HubSource(Frozen):
    """A data set of the Hugging Face Hub, read with the extra ``datasets``."""

    path: str
    name: str | None = None
    split: str = "test"
    revision: str | None = None
    fields: Fields = Fields()


class TaskSpec(Frozen):
    """A task file.

    ``until``: texts that end every agent's message, besides the mesh's own. ``file`` lies beside the task file; ``hub``
    is fetched; ``--data FILE`` takes the place of both. ``fields`` says how rows of ``file`` and ``--data`` are read.
    ``prompt`` is a template of the mesh's main input over a sample's fields. The first scorer's first metric is the
    primary one.
    """

    version: Literal[1]
    about: str = ""
    kind: Kind
    file: str | None = None
    hub: HubSource | None = None
    fields: Fields = Fields()
    prompt: str = "{{ question }}"
    until: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    scorers: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1)

    @field_validator("scorers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SCORERS:
                raise ValueError(f"expected some of {listing(SCORERS)}; found {name!r}.{did_you_mean(name, SCORERS)}")
        return names

    @model_validator(mode="after")
    def _one_source(self) -> TaskSpec:
        if self.file is not None and self.hub is not None:
            raise ValueError("expected samples in `file` or in `hub`, found both")
        return self


@dataclass(frozen=True)
class Task:
    """A task by its name, its folder and its file's content."""

    name: str
    folder: Path
    spec: TaskSpec


def load_task(name: str, libraries: Sequence[Path] = ()) -> Task:
    """A task by its name on a shelf, or by the path of its folder or file.

    Raises:
        NotFoundError: no such task; lists what there is.
        ConfigError: something is wrong in its file; starts with ``file:line:column``.
    """
    path = library.find("tasks", name, libraries=libraries)
    return Task(path.parent.name, path.parent, load_file(TaskSpec, path))
