"""Questions from a JSONL file, and the dense runs that turn them into model calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.bench.rig import Call, Recording
from agentmesh.blueprint import Blueprint
from agentmesh.config.mesh import RetrieverAgentSpec
from agentmesh.errors import InputError
from agentmesh.jsonl import read_objects
from agentmesh.mesh import Mesh
from agentmesh.prompt import ChatTokenizer, Content, ContentKind

EXPECTED = '{"question": …, "context": [{"title": …, "text": …}]}'


@dataclass(frozen=True)
class Question:
    """One line of the file: its text, paragraphs that go with it (``title`` and ``text`` joined), its other texts."""

    text: str
    context: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)

    def inputs(self, blueprint: Blueprint) -> dict[str, str]:
        """What a mesh is asked: the question, and what the line has under the names of the mesh's other inputs."""
        others = {name: self.others[name] for name in blueprint.inputs if name in self.others}
        return {**others, blueprint.main_input: self.text}


@dataclass(frozen=True)
class Passages:
    """``4x256``: how many passages of how many tokens a question's context is cut into."""

    count: int
    tokens: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each passage."""
        return (self.tokens,) * self.count

    @staticmethod
    def parse(text: str) -> Passages:
        """From its text.

        Raises:
            InputError: it is not two numbers with an x between them.
        """
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,5})", text)
        if match is None:
            raise InputError(f"--passages {text!r}: expected COUNTxTOKENS, such as 4x256")
        return Passages(int(match[1]), int(match[2]))

    def fitting(self, questions: Sequence[Question], limit: int, tokenizer: ChatTokenizer) -> list[Question]:
        """The first ``limit`` questions whose context is long enough.

        Raises:
            InputError: there are fewer.
        """
        found = list(islice((question for question in questions if self.cut(question, tokenizer)), limit))
        if len(found) < limit:
            raise InputError(
                f"--passages {self.count}x{self.tokens} needs {self.count * self.tokens} tokens of context, which "
                f"{len(found)} of {len(questions)} questions have, but {limit} are asked for; ask for fewer or shorter "
                "passages, or lower --limit/--warmup"
            )
        return found

    def cut(self, question: Question, tokenizer: ChatTokenizer) -> tuple[Content, ...]:
        """A question's passages, of exactly the asked length; none where its context is too short."""
        text = "\n\n".join(question.context)
        ids = tokenizer.encode(text, control=False)
        if len(ids) < self.count * self.tokens:
            return ()
        pieces = [tuple(ids[i * self.tokens : (i + 1) * self.tokens]) for i in range(self.count)]
        return tuple(
            Content(tokenizer.decode(piece), ContentKind.DOCUMENT, f"document {number}", piece)
            for number, piece in enumerate(pieces, 1)
        )


def read_questions(path: Path, limit: int) -> list[Question]:
    """Questions of a JSONL file with ``question`` and optionally ``context`` on each line, at least ``limit``.

    Raises:
        InputError: the file cannot be read, a line is no question, or there are fewer.
    """
    found = [_question(row, place) for place, row in read_objects(path, EXPECTED)]
    if len(found) < limit:
        raise InputError(f"--data {path} has {len(found)} questions, but {limit} are asked for; lower --limit/--warmup")
    return found


def _question(row: Mapping[str, Any], place: str) -> Question:
    try:
        context = tuple(f"{part.get('title', '')}\n{part['text']}".strip() for part in row.get("context") or ())
        others = {name: text for name, text in row.items() if isinstance(text, str)}
        return Question(str(row["question"]), context, others)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place}: expected {EXPECTED}, found the fields {', '.join(list(row)[:12])}") from error


@final
class GivenPassages(Agent):
    """Stands in for a retriever: says the passages that belong to a question.

    Args:
        name: of the input that is the question.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.passages: dict[str, tuple[Content, ...]] = {}

    async def act(self, turn: Turn) -> Answer:
        """The passages of the question at hand."""
        return self.passages[turn.inputs[self._name].text]


def stand_ins(blueprint: Blueprint, passages: Passages | None) -> dict[str, GivenPassages]:
    """A stand-in for each retriever of a mesh, where passages are given.

    Raises:
        InputError: passages are given, but the mesh has no retriever that would hand them out.
    """
    if passages is None:
        return {}
    nodes = [node for node, member in blueprint.members.items() if isinstance(member.spec, RetrieverAgentSpec)]
    if not nodes:
        raise InputError("--passages needs a mesh with an agent of `kind: retriever`, whose place the passages take")
    return {node: GivenPassages(blueprint.main_input) for node in nodes}


def dense_runs(
    mesh: Mesh,
    recording: Recording,
    questions: Sequence[Question],
    given: Mapping[str, GivenPassages],
    passages: Passages | None,
) -> Iterator[Sequence[Call]]:
    """Run a mesh on all questions, several at once, and give the model calls that each one made.

    Raises:
        InputError: two questions with one text have different passages.
    """
    if passages is not None:
        for question in questions:
            contents = passages.cut(question, recording.tokenizer)
            for agent in given.values():
                if agent.passages.setdefault(question.text, contents) != contents:
                    raise InputError(
                        f"the question {question.text[:60]!r} is there twice, with other passages each time, and "
                        "passages are handed out by question; leave one of them out"
                    )
    for low in range(0, len(questions), mesh.width):
        group = questions[low : low + mesh.width]
        asyncio.run(mesh.arun_all(question.inputs(mesh.blueprint) for question in group))
        yield from recording.take()
