"""Broken data files: every command and agent that reads JSON Lines names the line, before anything is loaded or run."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agentmesh.agents.retriever import parse_documents, read_documents
from agentmesh.bench.data import read_questions
from agentmesh.cli import invoke
from agentmesh.errors import InputError
from agentmesh.jsonl import LINE_LIMIT, read_objects
from agentmesh.suites.samples import Passage, Sample, read_samples
from agentmesh.suites.task import load_task

GOOD = '{"id": "%d", "question": "q", "answer": "1", "text": "t"}\n'
READERS: dict[str, Callable[[Path], object]] = {
    "samples": lambda path: read_samples(load_task("gsm8k"), path),
    "questions": lambda path: read_questions(path, 1),
    "documents": read_documents,
}
BROKEN = {
    "bad JSON": ("".join(GOOD % n for n in range(16)).encode() + b'{"id": "16", "question"\n', ":17: no JSON"),
    "missing field": (b'{"id": "a", "question": "q"}\n', ":1: no answer at 'answer'; found the fields id, question"),
    "empty": (b"", " holds no samples; expected lines of JSON"),
    "blank": (b"\n \n", " holds no samples; expected lines of JSON"),
    "one id twice": ((GOOD % 1).encode() * 2, ":2: the id '1' is there already"),
    "no object": (b'\n["q"]\n', ":2: found list, expected an object such as"),
    "no UTF-8": (b'{"id": "a", "question": "q\xff", "answer": "1"}\n', ":1: not UTF-8 (byte 26 of the line)"),
    "half a character": (rb'{"id": "a", "question": "\ud83d", "answer": "1"}', ":1: half a character"),
    "too deep": (b"[" * 100_000 + b"\n", ":1: no JSON"),
}


@pytest.fixture
def hole(tmp_path: Path) -> Path:
    """A file whose second line is a gigabyte; it takes no room on the disk."""
    path = tmp_path / "hole.jsonl"
    with path.open("wb") as stream:
        stream.write((GOOD % 1).encode() + b'{"question": "')
        stream.truncate(2**30)
    return path


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""
    monkeypatch.setattr("agentmesh.engine.loop.load", None)


@pytest.fixture
def flat_memory() -> Iterator[None]:
    """Python may allocate a few lines' worth of memory, and no more."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * LINE_LIMIT


def evaluated(path: Path) -> int:
    runs = ["--runs-dir", str(path.parent / "runs")]
    return invoke(["eval", "math-fully-connected", "--task", "gsm8k", "--data", str(path), "--warmup", "0", *runs])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("what", BROKEN)
def test_an_evaluation_ends_with_the_line_before_anything_is_made(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, (data, found) = tmp_path / "data.jsonl", BROKEN[what]
    path.write_bytes(data)

    assert evaluated(path) == 2

    assert f"{path}{found}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_model", "flat_memory")
def test_an_evaluation_refuses_a_gigabyte_in_a_line_at_once(hole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.process_time()

    assert evaluated(hole) == 2

    assert f"{hole}:2: the line is longer than 16 MiB" in capsys.readouterr().err
    assert time.process_time() - begun < 10


@pytest.mark.usefixtures("flat_memory")
@pytest.mark.parametrize("name", READERS)
def test_every_reader_refuses_a_line_without_end(hole: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"hole\.jsonl:2: the line is longer than 16 MiB"):
        READERS[name](hole)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("line", "found"), [("{", "no JSON"), ("7", "found int, expected an object"), ('{"x": 1}', "found the fields")]
)
def test_every_reader_names_the_line(tmp_path: Path, name: str, line: str, found: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD % 1 + "\n" + line)

    with pytest.raises(InputError, match=rf"data\.jsonl:3: .*{found}"):
        READERS[name](path)


@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl.*(cannot be read|does not exist)"):
        READERS[name](tmp_path / "none.jsonl")


def test_a_mark_at_the_beginning_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\xe2\x80\xa8"}\r\n')

    assert [row for _, row in read_objects(path, "x")] == [{"a": 1}, {"a": "\u2028"}]


def test_passages_with_line_separators_of_unicode_stay_whole() -> None:
    passages = (Passage(title="One", text="a\u2028b\x85c\x0bd"), Passage(title="Two", text="e\nf"))

    found = parse_documents(Sample(id="a", question="q", context=passages).passages, "input context")

    assert [(document.title, document.text) for document in found] == [("One", passages[0].text), ("Two", "e\nf")]
