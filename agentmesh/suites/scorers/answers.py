"""``has_answer`` and ``qa``: answers to questions as text, in SQuAD's normal form."""

from __future__ import annotations

from collections import Counter
from typing import final

from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import contains, final_text, normalised


@final
class HasAnswerScorer(Scorer):
    """Whether one of the right answers stands in the output as whole words."""

    metrics = ("has_answer",)

    async def score(self, sample: Sample, output: Output) -> Scored:
        """1 if any answer stands there; ``extracted`` is the first of them."""
        text = normalised(final_text(output.answer))
        found = next((answer for answer in golds(sample) if contains(text, normalised(answer))), None)
        return Scored(
            values={"has_answer": float(found is not None)},
            extracted=found or "",
            note="" if text else "the answer is empty",
        )

    async def answer(self, sample: Sample, text: str) -> str:
        """The sample's answer where any of the right ones stands in the text: they all mean the same."""
        plain = normalised(final_text(text))
        return golds(sample)[0] if any(contains(plain, normalised(gold)) for gold in golds(sample)) else ""


@final
class QaScorer(Scorer):
    """SQuAD's exact match and token F1, each the best over all right answers."""

    metrics = ("em", "f1")

    async def score(self, sample: Sample, output: Output) -> Scored:
        """The whole output counts as the answer, as in SQuAD: it has to be short."""
        text = final_text(output.answer).strip()
        found = normalised(text)
        right = [normalised(answer) for answer in golds(sample)]
        return Scored(
            values={
                "em": max(float(found == gold) for gold in right),
                "f1": max(token_f1(found, gold) for gold in right),
            },
            extracted=text,
            note="" if found else "the answer is empty",
        )

    async def answer(self, sample: Sample, text: str) -> str:  # noqa: ARG002  # the whole text is the answer
        """The text in normal form."""
        return normalised(final_text(text))


def golds(sample: Sample) -> tuple[str, ...]:
    """All answers that count as right."""
    return sample.answers or (sample.answer,)


def token_f1(found: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the tokens of two texts in normal form."""
    ours, theirs = found.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))
