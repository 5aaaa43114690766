"""``retriever``: the passages of a document collection that fit a query best, by BM25."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import bm25s

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.config.mesh import RetrieverAgentSpec
from agentmesh.errors import InputError
from agentmesh.jsonl import parse_objects, read_objects
from agentmesh.prompt import Content, ContentKind

SUFFIXES = (".txt", ".md")
EXPECTED = '{"title": …, "text": …}'


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
        found = [_document(row, place) for place, row in read_objects(path, EXPECTED)]
    else:
        raise InputError(f"documents: {path} does not exist; expected a folder of .txt or .md files, or a JSONL file")
    if not found:
        raise InputError(f"documents: {path} holds no documents; expected .txt or .md files, or lines of JSON")
    return found


def read_passages(path: Path) -> list[Content]:
    """Documents as agents hand them out; see ``read_documents``."""
    return [_content(index, document) for index, document in enumerate(read_documents(path))]


def parse_documents(text: str, place: str) -> list[Document]:
    """Documents from JSON Lines.

    Raises:
        InputError: a line that is no document.
    """
    return [_document(row, at) for at, row in parse_objects(text, place, EXPECTED)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"documents: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"documents: {path} is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _document(row: Mapping[str, Any], place: str) -> Document:
    text = row.get("text")
    if not isinstance(text, str):
        raise InputError(
            f"{place}: no text at 'text'; found the fields {', '.join(list(row)[:12])}; expected {EXPECTED}"
        )
    return Document(str(row.get("title", "")), text)


class Collection:
    """Documents that can be searched; immutable.

    Args:
        documents: at least one.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.contents = [_content(index, document) for index, document in enumerate(documents)]
        self._index = bm25s.BM25()
        corpus = [f"{document.title} {document.text}" for document in documents]
        self._index.index(bm25s.tokenize(corpus, show_progress=False), show_progress=False)

    def search(self, query: str, count: int) -> list[Content]:
        """The documents that fit a query best, best first."""
        words = bm25s.tokenize([query], show_progress=False)
        ranks, _ = self._index.retrieve(words, k=min(count, len(self.contents)), show_progress=False)
        return [self.contents[int(index)] for index in ranks[0]]


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
        path = None if spec.documents is None else folder / Path(spec.documents).expanduser()
        self._own = None if path is None else Collection(read_documents(path))

    async def act(self, turn: Turn) -> Answer:
        """The best passages, best first.

        Raises:
            InputError: the run's own passages cannot be read.
        """
        collection = self._own
        if collection is None:
            assert self._spec.passages is not None, "the mesh file gives documents or passages"
            found = parse_documents(turn.inputs[self._spec.passages].text, f"input {self._spec.passages}")
            collection = Collection(found)
        return collection.search(turn.inputs[self._spec.query].text, self._spec.top_k)

    def corpus(self) -> Sequence[Content]:
        """All documents that are there before a run."""
        return self._own.contents if self._own is not None else ()


def _content(index: int, document: Document) -> Content:
    text = f"{document.title}\n{document.text}" if document.title else document.text
    return Content(text, ContentKind.DOCUMENT, f"document {document.title or index}")
