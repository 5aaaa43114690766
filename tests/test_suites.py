"""Tasks and their samples: shipped ones, public data in its own shape, and files that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentmesh import library
from agentmesh.errors import ConfigError, InputError, NotFoundError, TemplateError, UsageError
from agentmesh.suites.prompt import SamplePrompt
from agentmesh.suites.samples import Sample, part, read_samples
from agentmesh.suites.task import Kind, Task, TaskSpec, load_task

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the evaluation data lies beside the project only")
FILES = {
    "gsm8k": "gsm8k",
    "math500": "math500",
    "aime": "aime24",
    "mmlu-rag": "mmlu",
    "hotpotqa": "hotpotqa",
    "squad": "squad",
    "humaneval": "humaneval",
    "mbpp": "mbpp",
}
MINI = ("math-mini", "rag-mini", "code-mini")


def a_task(tmp_path: Path, kind: str = "math", extra: str = "") -> Task:
    (tmp_path / "task.yaml").write_text(f"version: 1\nkind: {kind}\nfile: samples.jsonl\nscorers: [gsm8k]\n{extra}")
    return load_task(str(tmp_path))


@pytest.mark.parametrize("name", sorted(library.names("tasks")))
def test_shipped_tasks_load_and_say_what_they_are_about(name: str) -> None:
    task = load_task(name)

    assert task.spec.about
    SamplePrompt(task)


@pytest.mark.parametrize("name", MINI)
def test_mini_suites_have_enough_samples_of_graded_difficulty(name: str) -> None:
    task = load_task(name)
    levels = [json.loads(line)["level"] for line in (task.folder / "samples.jsonl").read_text().splitlines()]

    assert len(read_samples(task)) >= 60
    assert {1, 2} <= set(levels)


def test_every_answer_of_rag_mini_stands_in_its_gold_passage_alone() -> None:
    for sample in read_samples(load_task("rag-mini")):
        holding = [p.title for p in sample.context if sample.answer.lower() in p.text.lower()]

        assert holding == list(sample.gold), sample.id


@needs_shared
@pytest.mark.parametrize("name", sorted(FILES))
def test_public_data_is_read_by_the_declared_fields(name: str) -> None:
    task = load_task(name)
    samples = read_samples(task, SHARED / f"{FILES[name]}-dev.jsonl")

    assert len({sample.id for sample in samples}) == len(samples) >= 30
    assert all(SamplePrompt(task).render(sample).strip() for sample in samples)
    if task.spec.kind is Kind.RAG:
        assert all(sample.context for sample in samples)
    if name == "hotpotqa":
        assert all(sample.gold and all(len(sample.named(gold)) == 1 for gold in sample.gold) for sample in samples)
    if name == "mmlu-rag":
        assert all(sample.answer in "ABCD" and len(sample.choices) == 4 for sample in samples)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ('{"question": "q", "answer": "1"}\n' * 0, r"holds no samples"),
        ("".join(f'{{"id": {n}, "question": "q", "answer": 1}}\n' for n in range(16)) + '{"id"', r":17: no JSON"),
        ('{"id": "a", "question": "q"}\n', r":1: no answer at 'answer'; found the fields id, question"),
        ('{"id": "a", "question": "q", "answer": "1"}\n' * 2, r":2: the id 'a' is there already"),
        ('["q"]\n', r":1: found list, expected an object"),
        ('{"id": "a", "question": "q", "answer": "1", "context": [{"titel": 1}]}\n', r":1: context: expected a list"),
        ('{"id": "a", "question": "q", "answer": "1", "gold": [3]}\n', r":1: gold: there is no passage number 3"),
    ],
)
def test_broken_data_names_its_line(tmp_path: Path, lines: str, found: str) -> None:
    task = a_task(tmp_path)
    (tmp_path / "samples.jsonl").write_text(lines)

    with pytest.raises(InputError, match=found):
        read_samples(task)


def test_passages_of_one_title_are_told_apart_where_the_data_gives_their_places(tmp_path: Path) -> None:
    task = a_task(tmp_path)
    passages = [{"title": "One", "text": "a"}, {"title": "Two", "text": "b"}, {"title": "One", "text": "c"}]
    lines = [
        {"id": str(gold), "question": "q", "answer": "1", "context": passages, "gold": gold}
        for gold in ([2, 1], ["One"])
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))

    by_place, by_title = read_samples(task)

    assert [p.text for gold in by_place.gold for p in by_place.named(gold)] == ["c", "b"]
    assert [p.text for gold in by_title.gold for p in by_title.named(gold)] == ["a", "c"]
    assert Sample.model_validate_json(by_place.model_dump_json()) == by_place


def test_a_task_without_samples_asks_for_data() -> None:
    with pytest.raises(InputError, match="squad ships no samples; give a JSONL file with --data"):
        read_samples(load_task("squad"))


def test_the_hub_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)

    with pytest.raises(UsageError, match=r"agentmesh-kv\[datasets\], or give --data"):
        read_samples(load_task("gsm8k"))


def test_mistakes_in_a_task_file_have_a_position(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("version: 1\nkind: math\nscorers: [gsm8]\n")

    with pytest.raises(ConfigError, match=r"task\.yaml:3:\d+.*gsm8"):
        load_task(str(tmp_path))
    with pytest.raises(NotFoundError, match="Did you mean 'gsm8k'"):
        load_task("gsm8")


def test_a_prompt_may_use_the_fields_of_a_sample_only(tmp_path: Path) -> None:
    task = a_task(tmp_path, extra='prompt: "{{ questoin }}"\n')

    with pytest.raises(TemplateError, match=r"no field 'questoin'.*Did you mean 'question'"):
        SamplePrompt(task)


def test_an_answer_by_number_becomes_a_letter(tmp_path: Path) -> None:
    task = a_task(tmp_path, kind="choice")
    (tmp_path / "samples.jsonl").write_text('{"id": "a", "question": "q", "answer": 2, "choices": ["x", "y", "z"]}\n')

    assert read_samples(task)[0].answer == "C"


@pytest.mark.parametrize(
    ("warmup", "limit", "first", "count"), [(2, None, "3", 8), (2, "3", "3", 3), (2, "5-7", "5", 3), (0, "10", "1", 10)]
)
def test_warm_up_takes_the_first_samples(warmup: int, limit: str | None, first: str, count: int) -> None:
    samples = [Sample(id=str(number), question="q") for number in range(1, 11)]

    warm, rest = part(samples, warmup, limit)

    assert [sample.id for sample in warm] == [str(number) for number in range(1, warmup + 1)]
    assert (rest[0].id, len(rest)) == (first, count)


@pytest.mark.parametrize(("warmup", "limit"), [(10, None), (2, "9"), (2, "1-4"), (2, "8-20"), (2, "x"), (2, "7-5")])
def test_a_part_that_is_not_there_is_refused(warmup: int, limit: str | None) -> None:
    samples = [Sample(id=str(number), question="q") for number in range(10)]

    with pytest.raises(InputError, match=r"--(limit|warmup)"):
        part(samples, warmup, limit)


def test_two_sources_of_one_task_are_refused() -> None:
    with pytest.raises(ValueError, match="found both"):
        TaskSpec.model_validate(
            {"version": 1, "kind": "math", "file": "s.jsonl", "hub": {"path": "a/b"}, "scorers": ["gsm8k"]}
        )
