"""The report of an evaluation: what a page says, that it is safe to open, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browsing import colour, look_at, wait_for
from small import MESH, TASK

from agentmesh.cli import invoke
from agentmesh.evaluate.breakdown import break_down
from agentmesh.evaluate.findings import read_findings
from agentmesh.evaluate.journal import Row
from agentmesh.evaluate.page import Origin, html, plots, write_report
from agentmesh.evaluate.report import Request, evaluate
from agentmesh.events import CallRecord, MessageRecord
from agentmesh.metering import CheckRecord
from agentmesh.reasons import PlanRow, Reason, Treatment

SCRIPT = "</script><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation whose questions try to break out of the page."""
    root = tmp_path_factory.mktemp("report")
    task = root / "task"
    task.mkdir()
    (task / "task.yaml").write_text(TASK)
    lines = [
        {"id": f"s{n}", "question": f"{SCRIPT} How many are {n} 🍐 and {n + 1} pears, été?", "answer": str(2 * n + 1)}
        for n in range(7)
    ]
    (task / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "mesh.yaml").write_text(MESH)
    request = Request(
        mesh=str(root / "mesh.yaml"),
        task=str(task),
        presets=("dense", "linear"),
        warmup=3,
        limit="4",
        runs_dir=root / "runs",
    )
    return evaluate(request).path


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of that evaluation that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "runs" / made.name))


class Cells(HTMLParser):
    """The texts of a page's table rows."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def page_of(folder: Path) -> str:
    return write_report(folder)[0].read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def strip_texts(folder: Path) -> None:
    """Make the journal one of a version that recorded neither texts nor expected answers."""
    journal = folder / "samples.jsonl"
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    for row in rows:
        del row["expected"]
        for call in row["calls"]:
            for run in call["plan"]:
                del run["text"]
    journal.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_texts_of_a_calls_plan_are_its_prompt(made: Path) -> None:
    rows = read_findings(made).rows
    prompts = {
        (row.preset, row.sample, call.node): "".join(run.text for run in call.plan)
        for row in rows
        for call in row.calls
    }
    for row in rows:
        first, second = (prompts[row.preset, row.sample, node] for node in ("agent.1", "agent.2"))
        number = int(row.sample[1:])
        assert f"{SCRIPT} How many are {number} 🍐 and {number + 1} pears, été?" in first
        assert row.messages[0].text in second
        assert first == prompts["dense", row.sample, "agent.1"]
        assert row.expected == str(2 * number + 1)
    assert any(run.kind is Treatment.PLACED_REALIGNED and "pears" in run.text for run in rows[-1].calls[1].plan)


def test_the_pages_figures_are_those_of_the_results(folder: Path) -> None:
    cells = Cells(page_of(folder)).rows
    results = json.loads((folder / "results.json").read_text())

    for name, one in results["presets"].items():
        row = next(row for row in cells if row[0] == name and len(row) > 8)
        metrics = [
            f"{metric['value']:.3f} [{metric['ci95'][0]:.3f}, {metric['ci95'][1]:.3f}]"
            for metric in one["metrics"].values()
        ]
        assert row[1:3] == metrics
        assert row[3:6] == [str(one["n"]), str(one["errors"]), f"{one['calls_shared']} of {one['calls_shareable']}"]
        assert row[6] == f"{one['ttft_ms']['p50']:,.0f} ms"
    for name, one in results["paired"].items():
        row = next(row for row in cells if row[0] == name)
        assert row[2] == f"{one['delta']:+.3f} [{one['ci95'][0]:+.3f}, {one['ci95'][1]:+.3f}]"
        assert row[4:6] == [f"{one['same_answer']:.0%}", f"{one['same_text']:.0%}"]
    calls = [call for row in read_findings(folder).rows if row.preset == "linear" for call in row.calls]
    last = [call for call in calls if call.node == "agent.2"]
    total = sum(call.prompt_tokens for call in last)
    placed = sum(call.placed_exact + call.placed_realigned for call in last) / total
    assert 0 < placed < 1
    assert [row[-1] for row in cells if row[0] == "linear" and len(row) == 3][1] == f"{placed:.0%} of {total:,} placed"


def test_what_models_and_tasks_write_stays_text(folder: Path) -> None:
    page = page_of(folder)
    data = data_of(page)

    assert page.count("<script") == 2
    assert "<img" not in page
    assert any(SCRIPT in text for text in data["texts"])


def test_the_pages_samples_hold_every_prompt_with_what_happened_to_it(folder: Path) -> None:
    data = data_of(page_of(folder))
    calls = {(row.preset, row.sample, call.node): call for row in read_findings(folder).rows for call in row.calls}

    for sample in data["samples"]:
        assert data["texts"][sample["expected"]]
        for row in sample["rows"]:
            for agent in row["agents"]:
                call = calls[data["presets"][row["preset"]], sample["id"], agent["node"]]
                prompt = agent["call"]["prompt"]
                texts = [data["texts"][number] for _, number, _ in prompt]
                assert "".join(texts) == "".join(run.text for run in call.plan)
                for text, (_, _, runs) in zip(texts, prompt, strict=True):
                    assert sum(run[4] for run in runs) == len(text.encode("utf-16-le")) // 2
                kinds = [data["kinds"][run[0]] for _, _, runs in prompt for run in runs for _ in range(run[3])]
                assert kinds.count("placed-realigned") == call.placed_realigned
                assert len(kinds) == call.prompt_tokens
    assert len(data["texts"]) == len(set(data["texts"]))


def test_journals_without_texts_give_a_report_that_says_so(folder: Path) -> None:
    strip_texts(folder)

    page = page_of(folder)

    assert "The text of prompts was not recorded" in page
    assert data_of(page)["samples"][0]["rows"][1]["agents"][1]["call"]["tokens"][1] > 0


def test_prompts_are_left_out_where_the_page_would_be_heavy(folder: Path) -> None:
    found = read_findings(folder)

    page = html(found, Origin("", {}, ""), limit=100)

    assert "3 samples are shown without their prompts" in page
    prompts = [sample["rows"][0]["agents"][0]["call"]["prompt"] for sample in data_of(page)["samples"]]
    assert [prompt is None for prompt in prompts] == [False, True, True, True]
    assert "without their prompts" not in html(found, Origin("", {}, ""))


def test_a_page_of_100_samples_stays_light() -> None:
    words = "one two three four five six seven eight nine ten " * 30
    runs = [
        PlanRow(segment=name, kind=Treatment.COMPUTED, tokens=9, reason=Reason.FIXED_TEXT, text=words[:90])
        for name in ("fixed", "question", "message agent.1@0") * 10
    ]

    def row(preset: str, number: int) -> Row:
        names = [f"agent.{place}" for place in range(3)]
        return Row(
            preset=preset,
            sample=f"s{number}",
            answer=f"{number}",
            scores={"flexible": 1.0},
            messages=tuple(
                MessageRecord(node=n, role="r", round=0, text=f"{number} {n}{words}", tokens=9) for n in names
            ),
            calls=tuple(
                a_call(n, [run.model_copy(update={"text": f"{preset}{number}{n}{run.text}"}) for run in runs])
                for n in names
            ),
        )

    found = findings_of([row(preset, number) for preset in ("dense", "linear") for number in range(100)])

    assert len(html(found, Origin("", {}, "")).encode()) < 10_000_000


def a_call(node: str, runs: list[PlanRow], **changes: Any) -> CallRecord:
    tokens = {kind: sum(run.tokens for run in runs if run.kind is kind) for kind in Treatment}
    values: dict[str, Any] = {
        "node": node,
        "round": 0,
        "preset": "dense",
        "prompt_tokens": sum(tokens.values()),
        "placed_exact": tokens[Treatment.PLACED_EXACT],
        "placed_realigned": tokens[Treatment.PLACED_REALIGNED],
        "computed": tokens[Treatment.COMPUTED],
        "output_tokens": 1,
        "queue_ms": 1.0,
        "ttft_ms": 4.0,
        "decode_ms": 1.0,
        "finish": "stop",
        "plan": tuple(runs),
        "parts_ms": {"plan": 1.0, "forward": 2.0},
        **changes,
    }
    return CallRecord(**values)


def findings_of(rows: list[Row]) -> Any:
    from agentmesh.evaluate.findings import Findings
    from agentmesh.evaluate.folder import Settings

    presets = tuple(dict.fromkeys(row.preset for row in rows))
    asked: dict[str, Any] = {"task": "t", "data": None, "samples_sha256": "", "mesh": "m", "mesh_sha256": ""}
    asked |= {"model": "m", "presets": presets, "warmup": 0, "limit": None, "seed": 0, "epochs": 1, "judges": {}}
    return Findings.of(Settings(**asked), rows)


def test_the_breakdown_says_what_was_reused_where_time_went_and_who_parted_first() -> None:
    exact = PlanRow(segment="fixed", kind=Treatment.PLACED_EXACT, tokens=3, reason=Reason.IDENTICAL_PREFIX)
    moved = PlanRow(segment="question", kind=Treatment.PLACED_REALIGNED, tokens=5, reason=Reason.READ_BEFORE)
    rest = PlanRow(segment="question", kind=Treatment.COMPUTED, tokens=2, reason=Reason.BLOCK_HEAD)

    def row(preset: str, sample: str, said: tuple[str, str], runs: list[PlanRow], ttft: float) -> Row:
        messages = [MessageRecord(node=f"a.{n}", role="", round=0, text=text, tokens=1) for n, text in enumerate(said)]
        call = a_call("a.10", runs, ttft_ms=ttft)
        calls = (call, a_call("a.2", runs))
        return Row(preset=preset, sample=sample, answer=said[-1], messages=tuple(messages), calls=calls)

    whole = [moved.model_copy(update={"kind": Treatment.COMPUTED, "reason": Reason.PRESET_DENSE, "tokens": 10})]
    found = break_down(
        [
            row("dense", "x", ("so", "one two three"), whole, 10.0),
            row("dense", "y", ("so", "one"), whole, 30.0),
            row("dense", "z", ("so", "a b"), whole, 20.0),
            row("linear", "x", ("so", "one two four"), [exact, moved, rest], 4.0),
            row("linear", "y", ("so", "one"), [exact, moved, rest], 4.0),
            row("linear", "z", ("no", "c"), [exact, moved, rest], 4.0),
            Row(preset="linear", sample="w", error="it broke"),
        ]
    )

    documents = [exact.model_copy(update={"segment": f"document {name}"}) for name in "ab"]
    read = break_down([row("dense", "x", ("", ""), documents, 1.0)])
    assert {name: one.tokens for name, one in read.by_text["dense"].items()} == {"documents": 12}
    assert list(found.by_agent["linear"]) == ["a.2", "a.10"]
    question = found.by_text["linear"]["question"]
    assert [(part.reason, part.tokens) for part in question.parts] == [
        (Reason.READ_BEFORE, 30),
        (Reason.BLOCK_HEAD, 12),
    ]
    assert question.placed == pytest.approx(30 / 42)
    assert (found.placed("dense"), found.placed("linear")) == (0.0, pytest.approx(0.8))
    assert found.waits["dense"]["a.10"].ttft_ms == 20.0
    assert found.waits["dense"]["a.2"].parts_ms == {"queue": 1.0, "plan": 1.0, "forward": 2.0}
    parting = found.parting["linear vs dense"]
    assert (parting.n, parting.same, parting.words) == (3, 1, (0, 2))
    assert parting.agents == {"a.1": 1, "a.0": 1}
    assert [(bar.text, bar.count, bar.height) for bar in plots.histogram(parting)] == [
        ("0", 1, 100.0),
        ("1", 0, 0.0),
        ("2", 1, 100.0),
    ]


def test_many_words_in_common_fall_into_a_few_ranges() -> None:
    parting = break_down([]).parting
    assert parting == {}
    one = [Row(preset="a", sample=f"{n}", answer="w " * n + "x") for n in range(0, 300, 7)]
    other = [Row(preset="b", sample=f"{n}", answer="w " * n + "y") for n in range(0, 300, 7)]

    bars = plots.histogram(break_down([*one, *other]).parting["b vs a"])

    assert len(bars) <= plots.BARS
    assert sum(bar.count for bar in bars) == len(one)
    assert max(bar.height for bar in bars) == 100.0


def test_report_writes_a_page_and_a_summary_and_eval_names_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["report", "last", "--runs-dir", str(folder.parent)]) == 0
    assert capsys.readouterr().out.split() == [str(folder / "report.html"), str(folder / "summary.md")]
    assert invoke(["report", str(folder), "--output", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == (folder / "report.html").read_text()
    summary = (folder / "summary.md").read_text()
    assert "- **linear** scores" in summary
    assert "| linear | agent.2 |" in summary

    capsys.readouterr()
    assert invoke(["score", str(folder)]) == 0
    assert f"agentmesh report {folder}" in capsys.readouterr().out.replace("\n", "")


def test_a_folder_that_is_no_evaluation_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a-run"
    run.mkdir()
    (run / "manifest.json").write_text('{"seed": 0}')

    assert invoke(["report", str(run)]) == 1

    assert "is no folder of an `agentmesh eval`" in capsys.readouterr().err


def test_an_evaluation_that_was_cut_off_is_reported_as_far_as_it_came(folder: Path) -> None:
    (folder / "results.json").unlink()
    journal = folder / "samples.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))

    page = page_of(folder)

    assert "has not come to its end" in page
    assert not (folder / "results.json").exists()
    assert data_of(page)["presets"] == ["dense"]


def test_a_judges_agreement_and_failed_samples_are_in_the_page(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["eval"]["judges"] = {"agent.2": ["agent.1"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    rows = [
        row.model_copy(
            update={
                "chosen": {"agent.2": ("agent.1",)},
                "checks": (CheckRecord(node="agent.2", round=0, order=(1, 0), text="once more"),),
            }
        )
        for row in read_findings(folder).rows
    ]
    (folder / "samples.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    with (folder / "samples.jsonl").open("a") as journal:
        journal.write(Row(preset="linear", sample="s3", error="NodeError: <b>too long</b>").model_dump_json() + "\n")

    page = page_of(folder)

    judged = [row for row in Cells(page).rows if row[0] == "linear vs dense"][1]
    assert judged[1:4] == ["3", "100%", "0"]
    data = data_of(page)
    assert data["texts"][data["samples"][1]["rows"][0]["agents"][1]["again"]] == "once more"
    failed = [sample["id"] for sample in data["samples"] if sample["failed"]]
    assert failed == ["s3"]
    assert "<b>too long</b>" not in page


def test_a_browser_shows_the_samples_and_their_colours(folder: Path, browser: Any) -> None:
    page, _ = write_report(folder)
    look_at(browser, page.as_uri(), 1280, "light")

    assert browser.title == "task, mesh: an agentmesh evaluation"
    samples = browser.find_elements("css selector", ".sample")
    assert len(samples) == 4
    samples[0].find_element("css selector", "summary").send_keys("\ue007")
    wait_for(browser, lambda _: samples[0].find_elements("css selector", ".run"))
    runs = {
        kind: samples[0].find_elements("css selector", f".run.{kind}")
        for kind in ("placed-exact", "placed-realigned", "computed")
    }
    colours = {kind: colour(found[0]) for kind, found in runs.items() if found}
    assert colours["placed-realigned"] == "rgba(191, 233, 227, 1)"
    assert len(set(colours.values())) == len(colours) > 1
    runs["placed-realigned"][0].click()
    assert any(
        why.text.startswith("placed-realigned, read-before") for why in samples[0].find_elements("css selector", ".why")
    )
    prompt = samples[0].find_element("css selector", ".prompt").text
    assert SCRIPT in prompt.replace("\n", " ")
    browser.find_elements("css selector", "#filter label")[-1].click()
    assert not any(sample.is_displayed() for sample in samples)
    light = colour(browser.find_element("css selector", "body"))

    look_at(browser, page.as_uri(), 420, "dark")
    for summary in browser.find_elements("css selector", ".sample > summary"):
        browser.execute_script("arguments[0].click()", summary)
    assert colour(browser.find_element("css selector", "body")) != light
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    assert browser.get_log("browser") == []
