r"""``math``: whether a formula is equivalent to the right one, by math-verify.

The formula is the last ``\boxed{…}``, else what follows "the answer is", else the last formula of the text.
"""

from __future__ import annotations

import importlib.util
import re
from typing import final

from agentmesh.errors import UsageError
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import final_text, one_line
from agentmesh.suites.scorers.worker import Worker

STATED = re.compile(
    r"(?i:\banswer[\s*]*(?:\bis\b|:))[\s:*]*(?=(?P<rest>\$\$.+?\$\$|\\\[.+?\\\]|[^\n]{1,500}))", re.DOTALL
)
SENTENCE_END = re.compile(r"\.\s+(?=[A-Z])")
BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
DELIMITER = re.compile(r"\$|\\\(|\\\[")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
TAIL = 4_000  # characters at the end in which a formula is looked for where nothing points at one


@final
class MathScorer(Scorer):
    """Compares formulas in a process of its own, which lives from the first sample to ``close``.

    Args:
        limit_s: seconds for one sample; one that takes longer counts as wrong.

    Raises:
        UsageError: math-verify is not installed.
    """

    metrics = ("math",)

    def __init__(self, limit_s: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UsageError("the scorer math needs math-verify: pip install math-verify")
        self._worker = Worker(limit_s)

    async def score(self, sample: Sample, output: Output) -> Scored:
        """1 if the two are equivalent.

        Raises:
            RunError: the process cannot be started.
        """
        gold = boxed(sample.answer)
        readings, extracted = find(final_text(output.answer))
        compared = await self._worker.compare(_box(sample.answer if gold is None else gold), readings)
        return Scored(
            values={"math": float(compared.equal)},
            extracted=compared.extracted if extracted is None else extracted,
            note=one_line(compared.note),
        )

    async def answer(self, sample: Sample, text: str) -> str:  # noqa: ARG002  # any formula is an answer
        """The formula found.

        Raises:
            RunError: the process cannot be started.
        """
        readings, extracted = find(final_text(text))
        return (await self._worker.compare(_box("0"), readings)).extracted if extracted is None else extracted

    async def same(self, one: str, other: str) -> bool:
        """Whether two formulas are equivalent.

        Raises:
            RunError: the process cannot be started.
        """
        return one == other or (await self._worker.compare(_box(one), [_box(other)])).equal

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def find(text: str) -> tuple[list[str], str | None]:
    """Texts to read the formula from, the best first, and the formula itself where it is boxed."""
    if (inner := boxed(text)) is not None:
        return [_box(inner)], inner
    if not (stated := list(STATED.finditer(text))):
        return [text[-TAIL:]], None
    rest = SENTENCE_END.split(stated[-1]["rest"])[0].strip().rstrip(".*").strip()
    bare = not DELIMITER.search(rest) and not WORD.search(rest)  # such as x^2+1, of which math-verify reads a number
    return ([_box(rest), rest] if bare else [rest, _box(rest)]), None


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` whose braces are balanced holds; ``None`` where there is none."""
    last, inner, opened = -1, None, list[re.Match[str]]()
    for brace in BRACE.finditer(text):
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and start.start() > last:
                last, inner = start.start(), text[start.end() : brace.start()]
    return None if inner is None else inner.strip()


def _box(formula: str) -> str:
    return rf"\boxed{{{formula.strip()}}}"
