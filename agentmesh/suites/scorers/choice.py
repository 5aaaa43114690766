"""``choice``: the letter of a multiple-choice answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import final

from agentmesh.suites.samples import LETTERS, Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import contains, final_text, normalised

DECLARES = r"(?i:\b(?:answer|(?:correct|right|best)\s+(?:option|choice))[\s*]*(?:\bis\b|\bwould\s+be\b|:))"
FILLERS = r"(?i:[\s:*_\"'(\[{$\\]|\b(?:the|option|choice)\b|(?<=\\)(?:boxed|text|textbf|mathbf|mathrm)\b){0,40}"
REST = re.compile(rf"{DECLARES}[\s:*]*(?=(?P<rest>[^\n]{{0,200}}))")


@final
class ChoiceScorer(Scorer):
    """Finds the letter that an answer names: the last declaration, else the last mention, else a choice's text."""

    metrics = ("accuracy",)

    async def score(self, sample: Sample, output: Output) -> Scored:
        """Whether the letter found is the sample's."""
        found = chosen(final_text(output.answer), sample.choices)
        return Scored(
            values={"accuracy": float(found == sample.answer.strip().upper())},
            extracted=found,
            note="" if found else "no choice named",
        )

    async def answer(self, sample: Sample, text: str) -> str:
        """The letter found."""
        return chosen(final_text(text), sample.choices)


def chosen(text: str, choices: Sequence[str]) -> str:
    """The letter of the choice that a text names; empty where it names none, or several by their texts.

    "The answer is (B)" or "The answer is Paris", a boxed letter, and a line that holds nothing but a letter declare
    one, and the last declaration wins: "Answer: B. (C) is wrong" is B. Where nothing is declared, the last "(B)",
    "**B**", or "B." at the start of a line or at its end counts.
    """
    letters = LETTERS[: len(choices) or None]
    declared = [(match.start("letter"), 1, match["letter"].upper()) for match in _matches(_declared(letters), text)]
    stated = ((match.start("rest"), 0, _by_text(match["rest"], choices)) for match in REST.finditer(text))
    declared += [each for each in stated if each[2]]
    mentioned = [(match.start("letter"), 1, match["letter"]) for match in _matches(_mentioned(letters), text)]
    for found in declared, mentioned:
        if found:
            return max(found)[2]
    return _by_text(text, choices)


def _matches(patterns: Sequence[str], text: str) -> Iterator[re.Match[str]]:
    for pattern in patterns:
        yield from re.finditer(pattern, text, re.MULTILINE)


def _declared(letters: str) -> tuple[str, ...]:
    """A small letter counts only before a closing sign or alone: "the answer is a matter of taste"."""
    small = letters.lower()
    letter = rf"(?P<letter>[{letters}](?![\w'’]|-\w)|[{small}](?=[).:,*\]}}$]|[ \t]*$))"
    return (
        rf"{DECLARES}{FILLERS}{letter}",
        rf"\\boxed\{{{FILLERS}{letter}",
        rf"^[ \t>*_(\[$]*(?P<letter>[{letters}{small}])[ \t*_).:\]$]*$",
    )


def _mentioned(letters: str) -> tuple[str, ...]:
    return (
        rf"\((?P<letter>[{letters}])\)",
        rf"\*\*\(?(?P<letter>[{letters}])(?=[).:*])",
        rf"^[ \t>*_-]*(?P<letter>[{letters}])[.):](?=\s|$)",
        rf"(?<![\w.])(?P<letter>[{letters}])\.?[ \t]*$",
    )


def _by_text(text: str, choices: Sequence[str]) -> str:
    """The letter of the only choice whose full text stands in ``text``; one that is part of another does not count."""
    plain = normalised(text)
    pairs = zip(LETTERS, map(normalised, choices), strict=False)
    found = {letter: words for letter, words in pairs if contains(plain, words)}
    whole = [
        letter
        for letter, words in found.items()
        if not any(contains(other, words) and other != words for other in found.values())
    ]
    return whole[0] if len(whole) == 1 else ""
