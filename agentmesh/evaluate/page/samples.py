"""What the page needs to show one sample: its texts once each, and every prompt as runs of them.

The page's script makes a sample's view from this when it is opened, so that hundreds of samples stay light.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, final

from agentmesh.evaluate.breakdown import first_differing, natural
from agentmesh.evaluate.journal import Row
from agentmesh.events import CallRecord, MessageRecord
from agentmesh.prompt import FIXED
from agentmesh.reasons import PlanRow, Reason, Treatment

RUN_SIZE = 24
"""About as many characters as one run takes in the page, beside its text."""


@final
class Words:
    """Texts by number, each held once.

    Args:
        texts: those that have the first numbers.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._numbers = {text: number for number, text in enumerate(texts)}
        self.size = 0

    def number(self, text: str) -> int:
        """The text's number; a new one where it was not there."""
        if text not in self._numbers:
            self._numbers[text] = len(self._numbers)
            self.size += len(text)
        return self._numbers[text]

    def all(self) -> list[str]:
        """All texts in the order of their numbers."""
        return list(self._numbers)


@final
class Samples:
    """The samples of an evaluation as the page's script reads them.

    Args:
        rows: what each sample gave.
        presets: in the order in which they are shown.
        metric: the primary one, which says what is right; empty where there is none.
        limit: characters that texts and prompts may take; later samples are then shown without their prompts.
    """

    def __init__(self, rows: Sequence[Row], presets: Sequence[str], metric: str, limit: int) -> None:
        self._presets = presets
        self._metric = metric
        self._limit = limit
        self._texts = Words()
        self._names = Words([""])
        self._runs = 0
        self.without_prompts = 0
        self.without_text = False
        by_sample: dict[tuple[str, int], dict[str, Row]] = {}
        for row in rows:
            by_sample.setdefault((row.sample, row.epoch), {})[row.preset] = row
        order = sorted(by_sample, key=lambda key: (natural(key[0]), key[1]))
        self._samples = [self._sample(by_sample[key]) for key in order]

    def data(self) -> dict[str, Any]:
        """Plain data for the page: texts by number, names (of segments and sources) by number, and the samples."""
        return {
            "presets": list(self._presets),
            "metric": self._metric,
            "kinds": [str(kind) for kind in Treatment],
            "reasons": [[str(reason), reason.about] for reason in Reason],
            "texts": self._texts.all(),
            "names": self._names.all(),
            "samples": self._samples,
        }

    def _sample(self, found: dict[str, Row]) -> dict[str, Any]:
        """One sample: what it asks, and what each preset made of it."""
        ordered = [found[name] for name in self._presets if name in found]
        good = [row for row in ordered if not row.error]
        full = self._texts.size + self._runs * RUN_SIZE > self._limit
        self.without_prompts += full
        calls = next((row.calls for row in good if row.calls), ())
        inputs = [] if full or not calls else _segments(calls[0].plan)
        wrong = any(row.scores.get(self._metric, 1.0) < 1.0 for row in good)
        return {
            "id": ordered[0].sample,
            "epoch": ordered[0].epoch,
            "expected": self._texts.number(next((row.expected for row in ordered if row.expected), "")),
            "inputs": [self._run_of(name, runs) for name, runs in inputs if name != FIXED and _text(runs)],
            "differ": len({(*row.extracted.values(), *row.scores.values()) for row in good}) > 1,
            "parted": any(row.answer != good[0].answer or first_differing(good[0], row) for row in good),
            "wrong": wrong,
            "failed": len(good) < len(ordered),
            "cut": full,
            "rows": [self._row(row, cut=full) for row in ordered],
        }

    def _run_of(self, name: str, runs: Sequence[PlanRow]) -> list[int]:
        return [self._names.number(name), self._texts.number(_text(runs))]

    def _row(self, row: Row, *, cut: bool) -> dict[str, Any]:
        """One preset's answer, and its agents in the order of the graph."""
        calls = {(call.node, call.round): call for call in row.calls}
        checks = {(check.node, check.round): check.text for check in row.checks if not check.error}
        return {
            "preset": self._presets.index(row.preset),
            "error": row.error,
            "answer": self._texts.number(row.answer),
            "scores": row.scores,
            "extracted": row.extracted,
            "notes": row.notes,
            "wall_s": round(row.ended - row.begun, 3),
            "agents": [
                {
                    **self._agent(said, calls.get((said.node, said.round)), cut=cut),
                    "again": self._texts.number(checks.get((said.node, said.round), "")),
                }
                for said in row.messages
            ],
        }

    def _agent(self, said: MessageRecord, call: CallRecord | None, *, cut: bool) -> dict[str, Any]:
        """What one agent said, and what it read; a node without a model has no call."""
        found: dict[str, Any] = {"node": said.node, "role": said.role, "round": said.round}
        found["said"] = self._texts.number(said.text)
        if call is None:
            return found
        found["call"] = {
            "tokens": [call.placed_exact, call.placed_realigned, call.computed],
            "output": call.output_tokens,
            "ttft_ms": round(call.ttft_ms),
            "queue_ms": round(call.queue_ms),
            "finish": call.finish,
            "prompt": None if cut else [self._segment(name, runs) for name, runs in _segments(call.plan)],
        }
        return found

    def _segment(self, name: str, runs: Sequence[PlanRow]) -> list[Any]:
        """A segment: its name, its text, and its runs as kind, reason, source, tokens, length in UTF-16 units."""
        self._runs += len(runs)
        self.without_text |= not _text(runs) and any(run.tokens for run in runs)
        return [
            *self._run_of(name, runs),
            [
                [KINDS[run.kind], REASONS[run.reason], self._names.number(run.source), run.tokens, _units(run.text)]
                for run in runs
                if run.tokens
            ],
        ]


KINDS = {kind: number for number, kind in enumerate(Treatment)}
REASONS = {reason: number for number, reason in enumerate(Reason)}


def _segments(plan: Sequence[PlanRow]) -> list[tuple[str, list[PlanRow]]]:
    """A plan's rows by segment."""
    return [(name, list(runs)) for name, runs in groupby(plan, key=lambda run: run.segment)]


def _text(runs: Sequence[PlanRow]) -> str:
    return "".join(run.text for run in runs)


def _units(text: str) -> int:
    """How long a browser finds a text."""
    return len(text.encode("utf-16-le")) // 2
