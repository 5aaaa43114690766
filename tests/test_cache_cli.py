"""``agentmesh cache`` and ``agentmesh run --store``, as people use them."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli import invoke
from agentmesh.sharing.tier.folder import Folder

MESH = """
version: 1
model: random:tiny-llama
topology: chain
agents:
  agent:
    system: You are a careful reader of long texts, and you never hurry.
    prompt: "{{ question }}\\n{% for m in inbox %}\\n{{ m }}\\n{% endfor %}\\nGo on."
    generate: {max_tokens: 8}
communicator: {preset: rotate, min_tokens: 8}
"""


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """Two passages that are worth keeping, and one that is too short."""
    lines = [{"title": f"Pier {n}", "text": f"Pier {n} holds boats and nets. " * 6} for n in range(2)]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, [*lines, {"text": "short"}])))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    capsys.readouterr()
    code = invoke([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, errors = run(capsys, *arguments, "--format", "json")
    assert code == 0, errors
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_corpus_is_warmed_once_looked_at_verified_shrunk_and_cleared(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path
) -> None:
    here = ("--store", tmp_path / "kv")
    model = ("--model", "random:tiny-llama")
    first = as_json(capsys, "cache", "warm", docs, *model, *here)
    assert (first["computed"], first["there"], first["skipped"]) == (2, 0, 1)
    again = as_json(capsys, "cache", "warm", docs, *model, *here)
    assert (again["computed"], again["there"], again["skipped"], again["written_bytes"]) == (0, 2, 1, 0)
    assert as_json(capsys, "cache", "warm", docs, *model, *here, "--tenant", "t")["computed"] == 2

    stats = as_json(capsys, "cache", "stats", *here)
    assert [(row["tenant"], row["kind"], row["entries"]) for row in stats["entries"]] == [
        ("", "reading", 2),
        ("t", "reading", 2),
    ]
    assert as_json(capsys, "cache", "verify", *here) == {"whole": 4, "damaged": 0}

    victim = next((tmp_path / "kv" / "tenants" / "default").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    code, out, _ = run(capsys, "cache", "verify", *here)
    assert (code, out.split()[:1], "1 were damaged" in out) == (1, ["3"], True)
    code, out, _ = run(capsys, "cache", "stats", *here)
    assert "1 damaged or foreign files are set aside" in out
    as_json(capsys, "cache", "gc", *here)
    assert as_json(capsys, "cache", "stats", *here)["set_aside"] == 0

    evicted = as_json(capsys, "cache", "gc", *here, "--budget", "800KiB")["evicted"]
    assert evicted > 0
    assert as_json(capsys, "cache", "gc", *here, "--ttl", "0s")["evicted"] == 3 - evicted
    assert as_json(capsys, "cache", "clear", *here, "--yes") == {"removed": 0}


def test_clear_asks_and_removes_one_tenants_entries_only(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMESH_STORE", str(tmp_path / "kv"))
    for tenant in ("a", "b"):
        as_json(capsys, "cache", "warm", docs, "--model", "random:tiny-llama", "--tenant", tenant)

    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run(capsys, "cache", "clear")[0] != 0
    assert as_json(capsys, "cache", "clear", "--tenant", "a", "--yes") == {"removed": 2}
    assert [row["tenant"] for row in as_json(capsys, "cache", "stats")["entries"]] == ["b"]


def test_a_run_places_passages_that_were_warmed_before_anybody_read_them(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path
) -> None:
    mesh = tmp_path / "m.yaml"
    reader = "agents: {{retriever: {{kind: retriever, documents: {docs}, top_k: 2}}, reader: {{prompt: {prompt}}}}}\n"
    prompt = json.dumps("{% for m in inbox %}{{ m }}\n\n{% endfor %}\n{{ question }}")
    graph = "{nodes: {retriever: {}, reader: {}}, edges: [{from: retriever, to: reader}], output: reader}"
    mesh.write_text(
        f"version: 1\nmodel: random:tiny-llama\ntopology: {graph}\n{reader.format(docs=docs, prompt=prompt)}"
        "communicator: {preset: rotate, min_tokens: 8, store: kv}\n"
    )
    question = ("-i", "question=Which boats does Pier 1 hold?", "--runs-dir", tmp_path, "--display", "plain")

    cold = as_json(capsys, "run", mesh, *question, "--set", "communicator.store=other")
    assert as_json(capsys, "cache", "warm", docs, "--mesh", mesh)["computed"] == 2
    warm = as_json(capsys, "run", mesh, *question)

    assert [call["placed_realigned"] for call in cold["calls"]] == [0]
    assert warm["calls"][0]["placed_realigned"] > 200


def test_a_mesh_says_for_which_model_and_into_which_store_a_corpus_is_warmed(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(MESH.replace("min_tokens: 8", "min_tokens: 3, store: {path: kv, tenant: t}"))

    found = as_json(capsys, "cache", "warm", docs, "--mesh", tmp_path / "m.yaml")

    assert Path(found["store"]) == tmp_path / "kv"
    assert found["computed"] == 3
    assert [path.name for path in (tmp_path / "kv" / "tenants").iterdir()] == ["tenant-t"]


def test_the_second_run_with_a_store_places_what_the_first_one_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "m.yaml").write_text(MESH)
    line = (
        "run",
        tmp_path / "m.yaml",
        "-i",
        "question=How many boats lie at the pier?",
        "--runs-dir",
        tmp_path / "runs",
    )
    found = []
    for _ in range(2):
        code, out, errors = run(capsys, *line, "--store", tmp_path / "k v", "--format", "json", "--display", "plain")
        assert code == 0, errors
        found.append((json.loads(out), errors))

    (cold, said), (warm, said_again) = found
    assert "store: 0 entries read" in said
    assert "0 written" in said_again
    assert sum(call["placed_exact"] for call in warm["calls"]) > sum(call["placed_exact"] for call in cold["calls"])
    assert warm["answer"] == cold["answer"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("cache", "stats"), "make one: `agentmesh run MESH --store"),
        (("cache", "verify"), "no store at"),
        (("cache", "warm", "nowhere", "--model", "random:tiny-llama"), "nowhere does not exist"),
        (("cache", "warm", "DOCS", "--tenant", "../x", "--model", "random:tiny-llama"), "tenant '../x': expected"),
        (("cache", "warm", "DOCS", "--model", "random:tiny-lama"), "Did you mean 'tiny-llama'"),
    ],
)
def test_wrong_requests_end_with_what_to_do(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    told = [str(docs) if argument == "DOCS" else argument for argument in arguments]
    code, _, errors = run(capsys, *told, "--store", tmp_path / "kv")

    assert code == 2
    assert wanted in errors


def test_sizes_times_and_places_that_are_wrong_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    assert "such as 512MiB" in run(capsys, "cache", "gc", "--store", tmp_path / "kv", "--budget", "much")[2]
    assert "such as 120s" in run(capsys, "cache", "gc", "--store", tmp_path / "kv", "--ttl", "soon")[2]
    (tmp_path / "file").write_text("x")
    (tmp_path / "m.yaml").write_text(MESH)
    line = ("run", tmp_path / "m.yaml", "-i", "question=x", "--runs-dir", tmp_path / "runs", "--display", "none")
    code, _, errors = run(capsys, *line, "--store", tmp_path / "file")
    assert (code, "found a file, expected a folder" in errors) == (2, True)


def test_a_corpus_that_cannot_be_written_fails_and_says_why(
    capsys: pytest.CaptureFixture[str], docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Folder, "write", full)

    code, _, errors = run(capsys, "cache", "warm", docs, "--model", "random:tiny-llama", "--store", tmp_path / "kv")

    assert code == 1
    assert "2 of 3 passages could not be written" in errors
    assert "No space left on device" in errors
