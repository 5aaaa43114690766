"""Scorers: what counts as an answer in a model's text, what counts as right, and what cannot pass."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from agentmesh.errors import RunError, UsageError
from agentmesh.events import MessageRecord
from agentmesh.sandbox import Limits
from agentmesh.suites import task
from agentmesh.suites.samples import Passage, Sample
from agentmesh.suites.scorers import SCORERS, Output, Scored, Scorer, pass_at_k, worker
from agentmesh.suites.scorers.mathematics import MathScorer, boxed
from agentmesh.suites.scorers.programs import CodeScorer

HANGS = r"\boxed{9^{9^{9^{9}}}}"


def score(scorer: Scorer | str, text: str, /, *messages: str, **fields: Any) -> Scored:
    sample = Sample(id="1", **{"question": "?", **fields})
    said = [MessageRecord(node="r", role="R", round=0, text=message, tokens=1) for message in messages]
    used = SCORERS[scorer]() if isinstance(scorer, str) else scorer
    return asyncio.run(used.score(sample, Output(text, said)))


def test_every_name_that_a_task_can_use_has_a_scorer_with_metrics() -> None:
    made = {name: make() for name, make in SCORERS.items()}

    assert tuple(made) == task.SCORERS
    assert all(scorer.metrics for scorer in made.values())
    assert [name for name, scorer in made.items() if scorer.runs_code] == ["code"]


# ---- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "flexible", "strict"),
    [
        ("#### 18", "9 * 2 = 18\n#### 18", 1, 1),
        ("So 6 + 12 = 18.", "18", 1, 0),
        ("The answer is $1,234.50.", "1234.5", 1, 1),
        ("The final answer is: **42**", "42", 1, 1),
        (r"The answer is $\boxed{72}$.", "72", 1, 1),
        (r"the answer is \$5", "5", 1, 1),
        ("The answer is 5, not 6", "5", 0, 1),
        ("The answer is 4. Wait: the answer is 5", "5", 1, 1),
        ("#### 4\nthe answer is 5", "4", 0, 0),
        ("The answer is 5 of 6.\n#### 6", "6", 1, 1),
        ("#### Step 2\n#### 3", "3", 1, 1),
        ("### 7", "7", 1, 0),
        ("It loses -$5", "-5", 1, 0),
        ("It loses $-5", "-5", 1, 0),
        ("It is −5", "-5", 1, 0),
        ("10-5", "5", 1, 0),
        ("10-5", "-5", 0, 0),
        ("1,2,3", "3", 1, 0),
        ("1,2,3", "123", 0, 0),
        ("2,000,000 eggs", "2000000", 1, 0),
        ("about 20%", "20%", 1, 0),
        ("costs .5", "0.50", 1, 0),
        ("18.00", "18", 1, 0),
        ("1.5", "15", 0, 0),
        ("eighteen", "18", 0, 0),
        ("<think>#### 3</think>It is 4", "4", 1, 0),
        ("#### 5", "1 + 1,000 = 1001\n#### 1,001", 0, 0),
        ("#### ٣", "3", 0, 0),
    ],
)
def test_numbers(answer: str, gold: str, flexible: float, strict: float) -> None:
    assert score("gsm8k", answer, answer=gold).values == {"flexible": flexible, "strict": strict}


def test_a_number_is_extracted_bare_and_what_is_missing_is_noted() -> None:
    assert score("gsm8k", "It costs $1,234.", answer="1").extracted == "1234"
    assert score("gsm8k", "none", answer="1").note == "no number in the answer"
    assert "no number: 'many'" in score("gsm8k", "1", answer="many").note


# ---- formulas --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maths() -> Iterator[MathScorer]:
    scorer = MathScorer()
    yield scorer
    scorer.close()


@pytest.mark.parametrize(
    ("answer", "gold", "value"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac12", 1),
        (r"So \boxed{0.5}.", r"$\frac{1}{2}$", 1),
        (r"First \boxed{1}, then \boxed{2}.", "2", 1),
        (r"First \boxed{1}, then \boxed{2}.", "1", 0),
        (r"\boxed{2} and \boxed{3", "2", 1),
        (r"\boxed {7}", "7", 1),
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1),
        (r"\boxed{(x+1)^2}", "x^2 + 2x + 1", 1),
        (r"\boxed{x^2+1}", "x^2 + 2x + 1", 0),
        (r"\boxed{1{,}000}", "1000", 1),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1),
        (r"\boxed{x = 5}", "5", 1),
        (r"\boxed{}", "5", 0),
        ("The answer is 2x+1.", "2x+1", 1),
        ("The answer is 2x+1.", "2", 0),
        (r"The answer is 3\sqrt{2}", r"\sqrt{18}", 1),
        ("The answer is 12 apples. I hope it helps.", "12", 1),
        ("The answer is $x^2$. It is not $x$.", "x", 0),
        ("The answer is\n$$\n\\frac{3}{4}\n$$\nas 3 < 4.", "0.75", 1),
        ("**Answer:** 7", "7", 1),
        ("The answer is 5. No, the answer is 6.", "6", 1),
        ("First $y = 3$. Then $x = 4$.", "4", 1),
        ("It is 17", "17", 1),
        (r"<think>\boxed{3}</think>It is \boxed{4}", "4", 1),
        (r"<think>\boxed{3}</think>It is 4", "3", 0),
        (r"\boxed{2}", r"We see that $x$ is \boxed{2}", 1),
        ("no idea", "5", 0),
        ("", "5", 0),
    ],
)
def test_formulas(maths: MathScorer, answer: str, gold: str, value: float) -> None:
    assert score(maths, answer, answer=gold).values == {"math": value}


def test_a_formula_is_extracted_and_what_is_missing_is_noted(maths: MathScorer) -> None:
    assert score(maths, r"\boxed{ x^2 }", answer="x").extracted == "x^2"
    assert score(maths, "The answer is 12 apples", answer="x").extracted == "12"
    assert score(maths, "no idea", answer="x").note == "no formula in the answer"
    assert "is no formula" in score(maths, "5", answer="").note


def test_boxes_are_found_in_one_pass() -> None:
    assert boxed(r"\boxed{a{b}\}c}") == r"a{b}\}c"
    assert boxed(r"} \boxed{\boxed{a}") == "a"
    begun = time.process_time()
    assert boxed(r"\boxed{" * 20_000) is None
    assert time.process_time() - begun < 1


def processes() -> list[psutil.Process]:
    mine = psutil.Process().children(recursive=True)
    return [child for child in mine if worker.PROGRAM in child.cmdline()]


def test_a_formula_that_hangs_is_killed_and_the_next_sample_is_scored() -> None:
    before = processes()
    scorer = MathScorer(limit_s=3)

    async def three() -> tuple[list[Scored], float]:
        """The loop goes on meanwhile: the longest time it stood still comes back too."""
        samples = [Sample(id=str(n), question="?", answer="1") for n in range(3)]
        answers = [r"\boxed{1}", HANGS, r"\boxed{1.0}"]
        runs = [
            asyncio.ensure_future(scorer.score(sample, Output(answer)))
            for sample, answer in zip(samples, answers, strict=True)
        ]
        longest = 0.0
        while not all(run.done() for run in runs):
            begun = time.perf_counter()
            await asyncio.sleep(0.01)
            longest = max(longest, time.perf_counter() - begun)
        return [run.result() for run in runs], longest

    scored, longest = asyncio.run(three())
    started = [child for child in processes() if child not in before]
    scorer.close()

    assert [each.values["math"] for each in scored] == [1, 0, 1]
    assert scored[1].note == "stopped after 3 s"
    assert longest < 0.5
    assert len(started) == 1
    assert not started[0].is_running()


def test_one_process_serves_many_samples_and_may_die_in_between(maths: MathScorer) -> None:
    score(maths, "1", answer="1")
    first = maths._worker._process
    score(maths, "1", answer="1")
    assert maths._worker._process is first
    assert first is not None

    os.kill(first.pid, signal.SIGKILL)
    first.wait(5)

    assert score(maths, "1", answer="1").values == {"math": 1}


def test_closing_ends_a_comparison_and_the_scorer_can_start_again() -> None:
    scorer = MathScorer()

    async def cancelled() -> None:
        task = asyncio.create_task(scorer.score(Sample(id="1", question="?", answer="1"), Output(HANGS)))
        await asyncio.sleep(1)  # it has begun by now, and if not, the end comes just as well
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun = time.perf_counter()
    asyncio.run(cancelled())
    scorer.close()
    assert time.perf_counter() - begun < 5
    assert scorer._worker._process is None

    assert score(scorer, "1", answer="1").values == {"math": 1}
    scorer.close()
    scorer.close()


def test_a_process_that_cannot_start_is_an_error_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PROGRAM", "agentmesh.no_such_module")
    scorer = MathScorer()
    with pytest.raises(RunError, match=r"exit code 1.*no_such_module 10` shows why"):
        score(scorer, "1", answer="1")
    scorer.close()


# ---- letters ---------------------------------------------------------------------------------------------------

CITIES = ("London", "Paris", "Paris, Texas", "The Hague")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B. Paris", "B"),
        ("B) Paris", "B"),
        ("**B**", "B"),
        ("**B. Paris**", "B"),
        ("The answer is (B).", "B"),
        ("The answer is b.", "B"),
        ("the correct answer is: **B**", "B"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The correct option is B", "B"),
        ("The answer is option (B) Paris.", "B"),
        (r"The answer is $\boxed{\text{B}}$.", "B"),
        (r"\boxed{B}", "B"),
        ("I choose B.", "B"),
        ("A. London\nB. Paris\nC. Paris, Texas\nD. The Hague\nThe answer is B.", "B"),
        ("The answer is A. No, wait. The answer is B.", "B"),
        ("The answer is A. Wait, no:\nB", "B"),
        ("The answer is (B). Option (C) is wrong because it is in Texas.", "B"),
        ("Either (A) or (B)? It is rather (B) than so.", "B"),
        ("The answer is Paris.", "B"),
        ("London is in England. The answer is Paris.", "B"),
        ("The answer is A. Wait, the answer is Paris.", "B"),
        ("It can only be paris", "B"),
        ("It can only be Paris, Texas", "C"),
        ("It is the hague", "D"),
        ("It is in London or in The Hague", ""),
        ("The answer is a matter of taste", ""),
        ("The answer is E", ""),
        ("A good question", ""),
        ("", ""),
        ("<think>The answer is A.</think>B", "B"),
        ("<think>The answer is A.</think>Who knows", ""),
    ],
)
def test_letters(answer: str, letter: str) -> None:
    scored = score("choice", answer, answer=letter or "A", choices=CITIES)

    assert scored.extracted == letter
    assert scored.values == {"accuracy": float(bool(letter))}
    assert bool(scored.note) == (not letter)


def test_letters_without_choices_are_read_all_the_same() -> None:
    assert score("choice", "The answer is (J).", answer="J").values == {"accuracy": 1}


# ---- texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("It was the Eiffel Tower, of course.", ("Eiffel tower",), 1),
        ("It was N.A.S.A.!", ("NASA",), 1),
        ("no", ("yes", "No."), 1),
        ("Nobody knows", ("no",), 0),
        ("the cat", ("cats",), 0),
        ("Tower in Eiffel", ("Eiffel Tower",), 0),
        ("anything", ("the", "..."), 0),
        ("", ("x",), 0),
        ("<think>Paris?</think>London", ("Paris",), 0),
    ],
)
def test_an_answer_stands_in_the_text_as_whole_words(answer: str, golds: tuple[str, ...], value: float) -> None:
    assert score("has_answer", answer, answer=golds[0], answers=golds).values == {"has_answer": value}


@pytest.mark.parametrize(
    ("answer", "golds", "em", "f1"),
    [
        ("The  Eiffel Tower!", ("Eiffel tower",), 1, 1),
        ("Eiffel Tower in Paris", ("Eiffel Tower",), 0, 2 / 3),
        ("Gustave Eiffel", ("Eiffel Tower", "Gustave Eiffel"), 1, 1),
        ("tower tower", ("tower",), 0, 2 / 3),
        ("London", ("Paris",), 0, 0),
        ("the", ("a",), 1, 1),
        ("", ("x",), 0, 0),
        ("<think>London</think>\nParis", ("Paris",), 1, 1),
    ],
)
def test_exact_match_and_token_f1(answer: str, golds: tuple[str, ...], em: float, f1: float) -> None:
    assert score("qa", answer, answer=golds[0], answers=golds).values == pytest.approx({"em": em, "f1": f1})


def test_the_answer_alone_is_enough_where_there_are_no_others() -> None:
    assert score("qa", "x", answer="x").values["em"] == 1


# ---- passages --------------------------------------------------------------------------------------------------

CONTEXT = (
    Passage(title="One", text="First text."),
    Passage(title="Two", text=" Second text. "),
    Passage(title="Six", text=""),
    Passage(title="One", text="Other text."),
)


@pytest.mark.parametrize(
    ("messages", "gold", "value"),
    [
        (("One\nFirst text.\n\nTwo\nSecond text.",), ("One", "Two"), 1),
        (("One\nFirst text.", "Two\n Second text. "), ("One", "Two"), 1),
        (("One\nFirst text.",), ("One", "Two"), 0.5),
        (("One\nFirst", "text."), ("One",), 0),
        (("One\nFirst text.",), ("One", "One"), 1),
        (("Six",), ("Six",), 0),
        (("One",), ("Nine",), 0),
        ((), ("One",), 0),
        (("One\nFirst text.",), (0, 1), 0.5),
        (("One\nOther text.",), (3,), 1),
        (("One\nOther text.",), (0,), 0),
        (("One\nOther text.",), ("One",), 1),
    ],
)
def test_recall_is_the_share_of_gold_passages_in_messages(
    messages: tuple[str, ...], gold: tuple[int | str, ...], value: float
) -> None:
    assert score("recall", "First text.", *messages, context=CONTEXT, gold=gold).values == {"recall": value}


def test_recall_has_no_value_without_gold_and_names_what_is_missing() -> None:
    assert score("recall", "", "First text.", context=CONTEXT).values == {}
    scored = score("recall", "", "First text.", context=CONTEXT, gold=("One", "Two"))
    assert (scored.extracted, scored.note) == ("One", "not retrieved: Two")
    scored = score("recall", "", "First text.", context=CONTEXT, gold=(0, 3))
    assert (scored.extracted, scored.note) == ("One (passage 0)", "not retrieved: One (passage 3)")


# ---- code ------------------------------------------------------------------------------------------------------

TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert abs(candidate(2, 2) - 4) < 1\n"
GOOD = "def add(a, b):\n    return a + b\n"
SIGNATURE = '''from typing import List


def half(x):
    return x / 2


def add(a: int, b: int) -> int:
    """Adds.

    >>> add(1, 2)
    3
    """
'''


def fenced(code: str) -> str:
    return f"Here:\n```python\n{code}\n```\nDone."


def graded(answer: str, scorer: CodeScorer | None = None, **fields: Any) -> Scored:
    return score(scorer or CodeScorer(), answer, **{"entry_point": "add", "tests": TESTS, **fields})


@pytest.mark.parametrize(
    ("answer", "fields"),
    [
        pytest.param(fenced(GOOD), {}, id="block"),
        pytest.param(fenced(GOOD), {"tests": "assert add(1, 2) == 3"}, id="bare asserts"),
        pytest.param(fenced("def add(a, b): return 0") + fenced(GOOD), {}, id="last block"),
        pytest.param(GOOD, {}, id="no fence"),
        pytest.param("<think>" + fenced("def add(a, b): return 0") + "</think>\n\n" + GOOD, {}, id="after thinking"),
        pytest.param(fenced("add = lambda a, b: a + b"), {}, id="assigned"),
        pytest.param(fenced("from __future__ import annotations\n" + GOOD), {"question": SIGNATURE}, id="future"),
        pytest.param(fenced("return a + b"), {"question": SIGNATURE}, id="body"),
        pytest.param("    return a + b\n", {"question": SIGNATURE}, id="body without fence"),
        pytest.param(
            "    return help(a, b)\n\ndef help(a, b):\n    return a + b", {"question": SIGNATURE}, id="helper"
        ),
        pytest.param(
            fenced("def add(a: List, b):\n    return int(half(2 * a)) + b"), {"question": SIGNATURE}, id="uses question"
        ),
        pytest.param(
            fenced("return a + b"), {"question": 'def add(a, b):\n  """Adds.\n  """'}, id="body with two spaces"
        ),
        pytest.param(
            fenced(GOOD + 'if __name__ == "__main__":\n    print(add(int(input()), 2))'), {}, id="main is not run"
        ),
        pytest.param(
            fenced("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n" + GOOD), {}, id="dataclass"
        ),
        pytest.param(fenced("print('x' * 200_000)\n" + GOOD), {}, id="much output"),
        pytest.param(fenced("import sys, io\nsys.stdout = io.StringIO()\n" + GOOD), {}, id="own stdout"),
        pytest.param(fenced("def sum(a, b): return a + b"), {"entry_point": "sum"}, id="named as a builtin"),
    ],
)
def test_code_that_passes(answer: str, fields: dict[str, Any]) -> None:
    scored = graded(answer, **fields)

    assert scored.note == ""
    assert scored.values == {"pass@1": 1}
    assert scored.extracted


@pytest.mark.parametrize(
    ("code", "note"),
    [
        ("def add(a, b): return a", "AssertionError"),
        ("def plus(a, b): return a + b", "NameError: name 'add' is not defined"),
        ("import sys; sys.exit(0)", "ended early with exit code 0"),
        ("import os; os._exit(0)", "ended early with exit code 0"),
        ("raise SystemExit", "ended early with exit code 0"),
        ("def add(a, b): raise SystemExit(0)", "ended early with exit code 0"),
        ("def add(a, b): exit()", ""),
        ("import os\nif os.fork(): os._exit(0)\ndef add(a, b): os._exit(0)", "ended early"),
        ("def add(a, b): return 0\ncheck = lambda candidate: None", "AssertionError"),
        ("def add(a, b): return 0\nclass AssertionError(Exception): pass", "AssertionError"),
        ("import builtins\nbuiltins.AssertionError = SystemExit\ndef add(a, b): return 0", "AssertionError"),
        ("import builtins\nbuiltins.exec = builtins.compile = print\ndef add(a, b): return 0", "AssertionError"),
        ("def abs(x): return 0\ndef add(a, b): return 3 if a == 1 else 9", "AssertionError"),
        ("import builtins\nbuiltins.abs = lambda x: 0\ndef add(a, b): return 3 if a == 1 else 9", "AssertionError"),
        ("__builtins__ = {'abs': lambda x: 0}\ndef add(a, b): return 3 if a == 1 else 9", "AssertionError"),
        ("import sys\nsys.excepthook = print\ndef add(a, b): return 0", ""),
        ("import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): return 0", ""),
        ("def add(a, b):\n    return 0\n'''", "no Python: SyntaxError"),
        ("def add(a, b): return 0\nif 0: \\", "no Python: SyntaxError"),
        ("def add(a, b)", "no Python: SyntaxError"),
    ],
)
def test_code_that_cannot_pass(code: str, note: str) -> None:
    scored = graded(fenced(code))

    assert scored.values == {"pass@1": 0}
    assert scored.note.startswith(note)
    assert "\n" not in scored.note


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "```bash\nls\n```", "<think>" + GOOD])
def test_an_answer_without_code(answer: str) -> None:
    scored = graded(answer)

    assert (scored.values, scored.extracted, scored.note) == ({"pass@1": 0}, "", "no code block in the answer")


@pytest.mark.parametrize(
    ("code", "limits", "note"),
    [
        ("while True: pass", {"time_s": 1}, "stopped after 1 s"),
        ("while True: print('x' * 10_000)", {"output_bytes": 50_000}, "stopped: too much output"),
    ],
)
def test_code_is_stopped_at_the_limits(code: str, limits: dict[str, Any], note: str) -> None:
    scored = graded(fenced(code), CodeScorer(Limits(**limits)))

    assert (scored.values, scored.note) == ({"pass@1": 0}, note)


def test_code_that_nests_too_deep_for_the_parser_is_no_answer() -> None:
    for code in ("-" * 90_000 + "1", "a" + ".b" * 40_000, "(" * 50_000, "x = 1\n" * 50_000):
        assert graded(fenced(code)).values == {"pass@1": 0}


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(1, 1, 1, 1), (1, 0, 1, 0), (10, 3, 1, 0.3), (5, 2, 2, 0.7), (5, 4, 2, 1), (200, 1, 100, 0.5)],
)
def test_pass_at_k_is_the_chance_of_a_draw_without_return(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 2, 1), (1, 0, 2), (1, 0, 0), (1, -1, 1)])
def test_pass_at_k_of_nonsense_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(UsageError, match="expected 0 <= c <= n"):
        pass_at_k(n, c, k)
