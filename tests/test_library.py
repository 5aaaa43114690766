"""The shelves: lookup order, names, copies, and misses that say what exists."""

from pathlib import Path

import pytest

from agentmesh import library
from agentmesh.errors import NotFoundError, UsageError


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A library with one topology, one task, and a file that hides a shipped one."""
    for name in ("topologies/mine.yaml", "topologies/chain.yaml", "tasks/quiz/task.yaml", "tasks/quiz/samples.jsonl"):
        path = tmp_path / "shelf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("about: mine\n")
    return tmp_path / "shelf"


def test_a_name_is_found_among_the_shipped_files() -> None:
    assert library.find("topologies", "chain") == library.shipped("topologies") / "chain.yaml"
    assert library.find("topologies", "chain.yaml").is_file()


def test_a_library_hides_a_shipped_file_and_the_last_library_wins(shelf: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "chain.yml").write_text("about: flat\n")

    assert library.find("topologies", "chain", libraries=[shelf]) == shelf / "topologies" / "chain.yaml"
    assert library.find("topologies", "chain", libraries=[shelf, flat]) == flat / "chain.yml"
    assert library.find("topologies", "chain", libraries=[flat, shelf]) == shelf / "topologies" / "chain.yaml"


def test_a_path_is_tried_beside_the_file_that_uses_it_then_in_the_working_folder(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text("about: here\n")
    beside = shelf / "topologies"

    assert library.find("topologies", "./mine.yaml", beside=beside) == beside / "mine.yaml"
    assert library.find("topologies", "here.yaml", beside=beside) == Path("here.yaml")
    assert library.find("topologies", "shelf/topologies/mine") == Path("shelf/topologies/mine.yaml")


def test_a_bare_name_never_means_a_file_beside_the_mesh(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text("version: 1\n")

    assert library.find("topologies", "chain", beside=tmp_path) == library.shipped("topologies") / "chain.yaml"


def test_a_task_is_a_folder_with_a_task_file(shelf: Path) -> None:
    assert library.find("tasks", "quiz", libraries=[shelf]) == shelf / "tasks" / "quiz" / "task.yaml"
    assert library.find("tasks", str(shelf / "tasks" / "quiz")) == shelf / "tasks" / "quiz" / "task.yaml"
    assert library.names("tasks", [shelf])["quiz"] == shelf / "tasks" / "quiz" / "task.yaml"


def test_names_lists_every_shelf_once(shelf: Path) -> None:
    names = library.names("topologies", [shelf])

    assert list(names) == sorted(names)
    assert names["chain"] == shelf / "topologies" / "chain.yaml"
    assert {"mine", "debate"} <= names.keys()
    assert "README" not in names


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("debat", "no topology named 'debat'; known topologies: chain, debate"),
        ("debat", "Did you mean 'debate'?"),
        ("", "no topology named ''"),
        ("no/such.yaml", "topology file 'no/such.yaml' does not exist"),
        ("..", "no topology named '..'"),
        ("./", "is a folder, expected a file"),
        ("x" * 5000, "no topology named"),
        ("y/" * 4000, "does not exist"),
        ("a\0b", "no topology named"),
        ("a\0b.yaml", "does not exist"),
    ],
)
def test_a_miss_says_what_exists(name: str, fragment: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        library.find("topologies", name)

    assert fragment in str(caught.value)
    assert "chain" in str(caught.value)


def test_an_unknown_shelf_and_a_missing_library_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no shelf named 'topologys'.*Did you mean 'topologies'"):
        library.shipped("topologys")
    with pytest.raises(NotFoundError, match=r"--library .*nowhere: no such folder"):
        library.find("topologies", "chain", libraries=[tmp_path / "nowhere"])


def test_copy_takes_a_file_or_a_whole_task_and_never_overwrites(shelf: Path, tmp_path: Path) -> None:
    copied = library.copy("topologies", "chain", tmp_path)
    assert copied == tmp_path / "chain.yaml"
    assert copied.read_text() == library.find("topologies", "chain").read_text()

    task = library.copy("tasks", "quiz", tmp_path / "deep" / "quiz", libraries=[shelf])
    assert sorted(path.name for path in task.iterdir()) == ["samples.jsonl", "task.yaml"]

    with pytest.raises(UsageError, match="exists already"):
        library.copy("topologies", "chain", tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        library.copy("tasks", "quiz", tmp_path / "deep", libraries=[shelf])
    with pytest.raises(UsageError, match="cannot write"):
        library.copy("topologies", "chain", copied / "below-a-file" / "x.yaml")
