"""Which candidates a judge chose: those whose answer is the judge's, as the task's first scorer reads answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from agentmesh.evaluate.journal import Row
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Scorer

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
WORD = re.compile(r"\w+|\S")


async def with_choices(row: Row, sample: Sample, scorer: Scorer, judges: Mapping[str, Sequence[str]]) -> Row:
    """A row with what each judge chose, in the run and when it was asked once more.

    Args:
        row: its messages are there.
        sample: what it is about.
        scorer: reads answers.
        judges: judge → the nodes whose messages it chooses from; one that said nothing in this row is left out.
    """
    last = {message.node: message.text for message in row.messages}
    again = {check.node: check.text for check in row.checks if not check.error}
    found: tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]] = ({}, {})
    for judge, nodes in judges.items():
        candidates = {node: last[node] for node in nodes if node in last}
        for texts, choices in zip((last, again), found, strict=True):
            if judge in texts:
                choices[judge] = await chosen(texts[judge], candidates, sample, scorer)
    return row.model_copy(update={"chosen": found[0], "chosen_shuffled": found[1]})


async def chosen(text: str, candidates: Mapping[str, str], sample: Sample, scorer: Scorer) -> tuple[str, ...]:
    """The candidates, by node, whose answer is that of the judge's text; none where it agrees with nobody.

    Where the scorer finds no answer in the judge's text, a text's last number counts, or its last words.
    """
    answer = await scorer.answer(sample, text)
    if not answer:
        return tuple(node for node, said in candidates.items() if conclusion(said) == conclusion(text))
    answers = {node: await scorer.answer(sample, said) for node, said in candidates.items()}
    return tuple([node for node, other in answers.items() if other and await scorer.same(answer, other)])


def conclusion(text: str) -> str:
    """What a text ends up with: its last number, else its last words."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else " ".join(WORD.findall(text.lower())[-3:])
