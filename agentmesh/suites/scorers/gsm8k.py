"""``gsm8k``: the number that an answer ends in, read leniently and strictly, as lm-eval does."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import final

from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import final_text, one_line

# A minus counts unless it stands behind a number or a word, as in "10-5" and "step-2".
MINUS = r"(?:(?<![\w.)\]])[-−])?"
DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+"
NUMBER = rf"{MINUS}\\?\$?{MINUS}(?:{DIGITS})"
ANY = re.compile(NUMBER)
MARKED = re.compile(rf"####\s*(?P<number>{NUMBER})")
STATED = re.compile(
    rf"(?:####|\bthe\s+(?:final\s+)?answer\s+is:?)[\s*$\\(]*(?:boxed\{{)?(?P<number>{NUMBER})", re.IGNORECASE
)


@final
class Gsm8kScorer(Scorer):
    """Compares numbers: ``flexible`` takes the last one of the text, ``strict`` the last one that is declared.

    A number is declared behind ``####`` or behind "the answer is".
    """

    metrics = ("flexible", "strict")

    async def score(self, sample: Sample, output: Output) -> Scored:
        """Whether each reading of the answer equals the sample's number."""
        text = final_text(output.answer)
        gold, flexible, strict = gold_number(sample.answer), last_number(ANY, text), last_number(STATED, text)
        note = ""
        if gold is None:
            note = f"the sample's answer is no number: {sample.answer!r}"
        elif flexible is None:
            note = "no number in the answer"
        return Scored(
            values={"flexible": _equal(flexible, gold), "strict": _equal(strict, gold)},
            extracted="" if flexible is None else f"{flexible:f}",
            note=one_line(note),
        )

    async def answer(self, sample: Sample, text: str) -> str:  # noqa: ARG002  # any number is an answer
        """The last number, without zeros at its end."""
        found = last_number(ANY, final_text(text))
        return "" if found is None else f"{found.normalize():f}"


def gold_number(answer: str) -> Decimal | None:
    """The number behind ``####`` of a worked solution, else the answer as a number."""
    if (marked := last_number(MARKED, answer)) is not None:
        return marked
    bare = answer.strip().removesuffix(".").removesuffix("%").strip()
    return _value(bare) if ANY.fullmatch(bare) else None


def last_number(pattern: re.Pattern[str], text: str) -> Decimal | None:
    """The last number that a pattern finds; ``None`` where there is none."""
    found = list(pattern.finditer(text))
    return _value(found[-1]["number"] if pattern.groupindex else found[-1][0]) if found else None


def _value(number: str) -> Decimal:
    return Decimal(re.sub(r"[$,\\]", "", number.replace("−", "-")))


def _equal(found: Decimal | None, gold: Decimal | None) -> float:
    return float(found is not None and gold is not None and found == gold)
