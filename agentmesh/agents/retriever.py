"""``retriever``: the passages of a document collection that fit a query best, by BM25."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import bm25s

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.config.mesh import RetrieverAgentSpec
from agentmesh.errors import InputError
from agentmesh.prompt import Content, ContentKind

SUFFIXES = (".txt", ".md")


@dataclass(frozen=True)
class Document:
    """One passage with its title."""

    title: str
    text: str


def read_documents(path: Path) -> list[Document]:
    """Documents of a folder (``.txt``, ``.md``; one each) or a JSONL file (``text`` and optionally ``title``).

    Raises:
        InputError: nothing there, or a line that is no document.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        found = [Document(file.stem, _text(file)) for file in files]
    elif path.is_file():
        lines = _text(path).splitlines()
        found = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    else:
        raise InputError(f"documents: {path} does not exist; expected a folder of .txt or .md files, or a JSONL file")
    if not found:
        raise InputError(f"documents: {path} holds no documents; expected .txt or .md files, or lines of JSON")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"documents: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _parsed(line: str, place: str) -> Document:
    try:
        data = json.loads(line)
        return Document(str(data.get("title", "")), data["text"])
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f'documents: {place}: expected {{"text": …, "title": …}}, found {line[:60]!r}') from error


@final
class RetrieverAgent(Agent):
    """Ranks documents by BM25; its message has one content a passage, so that each can be shared by itself.

    Args:
        spec: from the mesh file.
        folder: where relative document paths begin.

    Raises:
        InputError: the documents cannot be read.
    """

    def __init__(self, spec: RetrieverAgentSpec, folder: Path) -> None:
        self._spec = spec
        self._documents = read_documents(folder / Path(spec.documents).expanduser())
        self._index = bm25s.BM25()
        corpus = [f"{document.title} {document.text}" for document in self._documents]
        self._index.index(bm25s.tokenize(corpus, show_progress=False), show_progress=False)

    async def act(self, turn: Turn) -> Answer:
        """The best passages, best first.

        Raises:
            InputError: the query input is not given.
        """
        if self._spec.query not in turn.inputs:
            raise InputError(f"the retriever searches for the input {self._spec.query!r}, which this run has not got")
        query = bm25s.tokenize([turn.inputs[self._spec.query].text], show_progress=False)
        count = min(self._spec.top_k, len(self._documents))
        ranks, _ = self._index.retrieve(query, k=count, show_progress=False)
        return [self._content(int(index)) for index in ranks[0]]

    def corpus(self) -> Sequence[Content]:
        """All its documents."""
        return [self._content(index) for index in range(len(self._documents))]

    def _content(self, index: int) -> Content:
        document = self._documents[index]
        text = f"{document.title}\n{document.text}" if document.title else document.text
        return Content(text, ContentKind.DOCUMENT, f"document {document.title or index}")
