"""Scorers by name: what an answer is worth.

base         the interface
gsm8k        numbers, leniently and strictly
mathematics  formulas, by math-verify in a process of its own (``worker``, ``equivalence``)
choice       letters
answers      texts: does the answer stand there, is it the answer
recall       retrieved passages
programs     code, run against tests in the sandbox
text         what they share
"""

from __future__ import annotations

from collections.abc import Callable

from agentmesh.suites.scorers.answers import HasAnswerScorer, QaScorer
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.choice import ChoiceScorer
from agentmesh.suites.scorers.gsm8k import Gsm8kScorer
from agentmesh.suites.scorers.mathematics import MathScorer
from agentmesh.suites.scorers.programs import CodeScorer, pass_at_k
from agentmesh.suites.scorers.recall import RecallScorer

__all__ = ["SCORERS", "Output", "Scored", "Scorer", "pass_at_k"]

SCORERS: dict[str, Callable[[], Scorer]] = {
    "gsm8k": Gsm8kScorer,
    "math": MathScorer,
    "choice": ChoiceScorer,
    "has_answer": HasAnswerScorer,
    "qa": QaScorer,
    "recall": RecallScorer,
    "code": CodeScorer,
}
"""Name in ``task.yaml`` → what makes the scorer."""
