"""The live page, by clicking through real runs of a real server."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browsing import colour, look_at, resize, wait_for
from serving import serving

from agentmesh import Mesh, agent
from agentmesh.agents.base import Turn
from agentmesh.prompt import Content
from agentmesh.serve.app import Service
from agentmesh.serve.keys import read_keys
from agentmesh.serve.limits import Limits
from agentmesh.serve.meshes import Served
from agentmesh.serve.native import NativeApi
from agentmesh.serve.runs import Run

QUESTION = "How many are 3 🍐 and 4? </p><script>document.title = 'taken over'</script><img src=x onerror=alert(1)>"
PROMPT = """{{ role }} of a team that answers
{{ question }}
{% for message in inbox %}
{{ message }}
{% endfor %}
Now."""
ENTER, RIGHT, END = "\ue007", "\ue014", "\ue010"


class Door:
    """Keeps the second agent from its work until a test opens it."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def agent(self) -> Any:
        @agent
        async def checker(turn: Turn) -> Content:
            for _ in range(1200):
                if self.open.is_set():
                    break
                await asyncio.sleep(0.05)
            if "break" in turn.question:
                raise ValueError("the <b>checker</b> broke")
            return await turn.generate(PROMPT, max_tokens=24)

        return checker


@contextmanager
def serving_page(mesh: Mesh, keys: str = "") -> Iterator[str]:
    """The address of a server of one mesh."""
    limits = Limits(drain_s=5.0)
    with serving(Service({"team": Served(mesh, "Three of a team.")}, read_keys(None, keys), limits)) as server:
        yield server.url


@pytest.fixture
def door() -> Iterator[Door]:
    made = Door()
    yield made
    made.open.set()


@pytest.fixture
def team(door: Door) -> Iterator[Mesh]:
    """Three agents on a tiny random model, each reading those before it; the second waits for its door."""
    spec = {"role": "Solver", "prompt": PROMPT, "generate": {"max_tokens": 24}}
    agents = {"agent.1": spec, "agent.2": door.agent(), "agent.3": {**spec, "role": "Closer"}}
    with Mesh(
        agents=agents,
        topology={"use": "fully-connected", "agents": 3},
        model="random:tiny-llama",
        communicator={"preset": "epic", "min_tokens": 8},
        run={"deterministic": True},  # the cost gate would compute everything in so small a model
        name="team",
    ) as mesh:
        mesh.load()
        yield mesh


def ask(browser: Any, question: str) -> None:
    """Start a run with the keyboard."""
    field = wait_for(browser, lambda page: page.find_element("css selector", "#inputs textarea"))
    field.clear()
    browser.execute_script("arguments[0].value = arguments[1]", field, question)  # drivers cannot type emojis
    browser.find_element("css selector", "button.main").send_keys(ENTER)


def one(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def ended(browser: Any, status: str) -> None:
    wait_for(browser, lambda page: status in one(page, "#run-status").text)


def get(address: str) -> Any:
    with urllib.request.urlopen(address, timeout=30) as response:  # noqa: S310  # this machine's own server
        return json.load(response)


def plan_of(address: str) -> dict[str, list[dict[str, Any]]]:
    """Node → the plan of its call, as the newest run's events say."""
    run = get(f"{address}/api/runs")["runs"][0]["run"]
    with urllib.request.urlopen(f"{address}/api/runs/{run}/events", timeout=30) as response:  # noqa: S310  # the same
        events = [json.loads(line) for line in re.findall(r"^data: (.*)$", response.read().decode(), re.MULTILINE)]
    calls = [event["call"] for event in events if event.get("type") == "model.finished"]
    return {call["node"]: [row for row in call["plan"] if row["tokens"]] for call in calls}


def test_a_run_of_three_agents_is_shown_from_start_to_end(team: Mesh, door: Door, browser: Any) -> None:
    with serving_page(team) as address:
        look_at(browser, address, 1280, "light")
        ask(browser, QUESTION)
        wait_for(browser, lambda page: "at work" in one(page, '[data-key="agent.2@0"] .state').text)

        assert one(browser, '[data-key="agent.1@0"]').get_attribute("class") == "node done"
        assert one(browser, '[data-key="agent.3@0"] .state').text == "waits for agent.2"
        assert one(browser, "#now").text == "agent.2 is at work. agent.3 waits for agent.2."
        wires = [wire.get_attribute("class") for wire in browser.find_elements("css selector", ".wire")]
        assert sorted(wires) == ["wire pending", "wire taken", "wire there"]

        door.open.set()
        ended(browser, "done")
        plans = plan_of(address)
        answer = get(f"{address}/api/runs")["runs"][0]["answer"]
        wait_for(browser, lambda page: one(page, "#answer-text").text)

        assert one(browser, "#answer-text").get_property("textContent") == answer
        assert browser.title == "✓ team: agentmesh"  # the question has not become markup
        assert one(browser, "#asked pre").get_property("textContent") == QUESTION
        check_graph(browser, plans)
        check_prompts(browser, plans)
        assert any(told.startswith("agent.3 waited") for told in texts(browser, "#told li"))
        waits = [
            piece.get_attribute("aria-label") for piece in browser.find_elements("css selector", ".track .span-waiting")
        ]
        assert any(re.match(r"agent\.3 waited for agent\.2 for .*s\.", told) for told in waits)
        assert "dense ≈" in one(browser, '#firsts [data-key="agent.3@0"]').text
        browser.execute_script("arguments[0].focus()", one(browser, ".ask"))
        assert "Not measured" in one(browser, "#estimate").text
        assert [text.split()[0] for text in texts(browser, "#texts article")] == ["agent.1", "agent.2", "agent.3"]
        assert browser.get_log("browser") == []


def check_graph(browser: Any, plans: dict[str, list[dict[str, Any]]]) -> None:
    """The label of an edge is what the reader's plan says of the message."""
    for source, target in (("agent.1", "agent.2"), ("agent.1", "agent.3"), ("agent.2", "agent.3")):
        rows = [row for row in plans[target] if row["segment"] == f"message {source}@0"]
        total = sum(row["tokens"] for row in rows)
        reused = sum(row["tokens"] for row in rows if row["kind"] != "computed")
        pill = one(browser, f'[data-key="{target}@0"] .pill[data-key="{source}@0"]')
        assert pill.text.splitlines() == [f"{total} tokens", f"{int(100 * reused / total + 0.5)} % reused"]


def check_prompts(browser: Any, plans: dict[str, list[dict[str, Any]]]) -> None:
    """Every row of a plan is a piece that says what, how many, from whom and why, to the mouse and to the keyboard."""
    for node, plan in plans.items():
        call = one(browser, f'#prompts [data-key="{node}@0"]')
        pieces = call.find_elements("css selector", ".piece")
        assert [piece.get_attribute("class").split()[1] for piece in pieces] == [row["kind"] for row in plan]
        for piece, row in zip(pieces, plan, strict=True):
            told = piece.get_attribute("aria-label")
            assert f"{row['tokens']} token" in told
            assert f"{row['kind']}, {row['reason']}. " in told
            assert not row["source"] or f"From: {row['source']}." in told
    assert any(row["kind"] == "placed-realigned" for row in plans["agent.3"])
    why = call.find_element("css selector", ".why")
    browser.execute_script("arguments[0].focus()", pieces[0])
    first = why.text
    browser.switch_to.active_element.send_keys(RIGHT)
    assert browser.switch_to.active_element == pieces[1]
    assert first != why.text == pieces[1].get_attribute("aria-label")
    browser.switch_to.active_element.send_keys(END)
    assert browser.switch_to.active_element == pieces[-1]
    assert [piece.get_attribute("tabindex") for piece in pieces].count("0") == 1


def test_runs_are_cancelled_fail_and_are_opened_again(team: Mesh, door: Door, browser: Any) -> None:
    with serving_page(team) as address:
        look_at(browser, address, 1280, "light")
        ask(browser, "one")
        wait_for(browser, lambda page: "at work" in one(page, '[data-key="agent.2@0"] .state').text)
        one(browser, "#cancel").click()
        ended(browser, "cancelled")
        assert not one(browser, "#cancel").is_displayed()
        assert one(browser, '[data-key="agent.3@0"] .state').text == "stopped"

        door.open.set()
        ask(browser, "break")
        ended(browser, "failed")
        assert "the <b>checker</b> broke" in one(browser, "#failure").text
        assert one(browser, '[data-key="agent.2@0"] .state').text == "failed: ValueError: the <b>checker</b> broke"

        ask(browser, "three")
        ended(browser, "done")
        wait_for(browser, lambda page: [row[:1] for row in texts(page, "#history li")] == ["✓", "✕", "■"])
        browser.find_elements("css selector", "#history a")[1].click()
        ended(browser, "failed")
        browser.find_elements("css selector", "#history a")[0].click()
        ended(browser, "done")
        assert len(browser.find_elements("css selector", "#prompts article")) == 3
        browser.refresh()
        ended(browser, "done")
        assert one(browser, "#history a[aria-current=page]").text.startswith("✓")

        ask(browser, "   ")
        wait_for(browser, lambda page: "question" in one(page, "#refused").text)


def test_a_lost_connection_is_taken_up_where_it_broke_off(
    team: Mesh, door: Door, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = NativeApi._stream

    async def broken(api: NativeApi, run: Run, after: int) -> AsyncIterator[str]:
        """The stream of ``NativeApi``, which breaks off once, behind its third event."""
        asked.append(after)
        async for sent in whole(api, run, after):
            yield sent
            if len(asked) == 1 and sent.startswith("id: 2\n"):
                return

    monkeypatch.setattr(NativeApi, "_stream", broken)
    door.open.set()
    with serving_page(team) as address:
        look_at(browser, address, 1280, "light")
        ask(browser, "one")
        ended(browser, "done")

        assert asked == [-1, 2]
        assert len(browser.find_elements("css selector", "#prompts article")) == 3


def test_light_and_dark_narrow_and_wide_are_readable(team: Mesh, door: Door, browser: Any) -> None:
    door.open.set()
    with serving_page(team) as address:
        look_at(browser, address, 420, "dark")
        ask(browser, QUESTION)
        ended(browser, "done")
        dark = colour(one(browser, "body"))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
        assert "wide" not in one(browser, "#graph").get_attribute("class").split()
        one(browser, "#theme").click()
        light = colour(one(browser, "body"))
        assert light != dark
        browser.refresh()
        ended(browser, "done")
        assert colour(one(browser, "body")) == light

        resize(browser, 1280, "dark")
        wait_for(browser, lambda page: "wide" in one(page, "#graph").get_attribute("class").split())
        kinds = {kind: one(browser, f"#prompts .{kind}") for kind in ("placed-realigned", "computed")}
        assert len({colour(element) for element in kinds.values()}) == 2
        patterns = {str(element.value_of_css_property("background-image")) for element in kinds.values()}
        assert len(patterns) == 2
        assert "none" not in patterns


def test_a_server_with_keys_is_asked_with_the_key_that_is_typed(team: Mesh, door: Door, browser: Any) -> None:
    door.open.set()
    key = "0123456789-secret"
    with serving_page(team, f"a {key}") as address:
        look_at(browser, address, 1280, "light")
        field = wait_for(browser, lambda page: one(page, "#key").is_displayed() and one(page, "#key-field"))
        field.send_keys("wrong", ENTER)
        wait_for(browser, lambda page: one(page, "#refused").is_displayed())
        field.send_keys(key, ENTER)
        wait_for(browser, lambda page: not one(page, "#key").is_displayed())
        ask(browser, "one")
        ended(browser, "done")
        assert key not in browser.page_source
        assert key not in browser.current_url


def test_the_page_needs_nothing_from_elsewhere_and_wears_the_reports_colours(root: Path) -> None:
    page = root / "agentmesh/serve/page"
    report = (root / "agentmesh/evaluate/page/report.css").read_text()
    light, dark = re.split(r"@media \(prefers-color-scheme: dark\)", report)
    style = (page / "page.css").read_text()
    for name in (
        "page",
        "card",
        "ink",
        "soft",
        "line",
        "accent",
        "exact",
        "realigned",
        "computed",
        "queue",
        "plan",
        "forward",
    ):
        pair = [re.search(rf"--{name}: (#\w+);", half)[1] for half in (light, dark)]  # type: ignore[index]
        assert f"--{name}: light-dark({pair[0]}, {pair[1]})" in style
    for file in page.iterdir():
        found = set(re.findall(r"https?://[^\s\"']+", file.read_text())) - {"http://www.w3.org/2000/svg"}
        assert not found, file
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", file.read_text()), file
