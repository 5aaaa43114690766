"""``recall``: how many of the passages that hold the answer the mesh has retrieved."""

from __future__ import annotations

from typing import final

from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import one_line


@final
class RecallScorer(Scorer):
    """Share of gold passages whose whole text stands in a message, which is how a retriever's message looks."""

    metrics = ("recall",)

    async def score(self, sample: Sample, output: Output) -> Scored:
        """The share; no value for a sample that names no gold passages."""
        if not sample.gold:
            return Scored(values={})
        found, missing = list[str](), list[str]()
        for gold in dict.fromkeys(sample.gold):
            texts = [passage.text.strip() for passage in sample.named(gold)]
            there = any(text and text in message.text for text in texts for message in output.messages)
            (found if there else missing).append(_shown(gold, sample))
        return Scored(
            values={"recall": len(found) / (len(found) + len(missing))},
            extracted="; ".join(found),
            note=one_line(f"not retrieved: {'; '.join(missing)}") if missing else "",
        )


def _shown(gold: int | str, sample: Sample) -> str:
    """A passage for people: its title, with its place where it is given by that."""
    return gold if isinstance(gold, str) else f"{sample.context[gold].title} (passage {gold})".strip()
