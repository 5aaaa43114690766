"""Passages of a corpus that nobody has read yet: each is computed once, behind a neutral header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from agentmesh.communicator.keeper import Keeper
from agentmesh.engine.scout import Scout
from agentmesh.engine.slices import Slices, noted
from agentmesh.engine.spans import Part
from agentmesh.prompt.segments import Content


@final
@dataclass(frozen=True)
class Passages:
    """Computes passages and has them kept.

    Args:
        min_tokens: shorter ones are left out.
        keeper: keeps them.
        scout: computes them beside the live sequences.
        under_way: tokens and tenants of those that are being computed.
    """

    min_tokens: int
    keeper: Keeper
    scout: Scout
    under_way: set[tuple[tuple[int, ...], str]] = field(default_factory=set)

    def ingest(self, contents: Sequence[Content], header: tuple[int, ...], tenant: str) -> Slices[int]:
        """Keep passages; those that are too short, kept already, or beyond the budget are left out."""
        kept, spans = 0, self.scout.runner.spans
        for content in contents:
            tokens = content.tokens or ()
            while (tokens, tenant) in self.under_way:
                yield
            if len(tokens) < self.min_tokens or self.keeper.knows(tokens, tenant):
                continue
            if self.keeper.recall_passage(tokens, tenant):
                kept += 1
            else:
                kept += yield from noted(spans, Part.INGEST, self._compute(content, header, tokens, tenant))
        return kept

    def _compute(self, content: Content, header: tuple[int, ...], tokens: tuple[int, ...], tenant: str) -> Slices[bool]:
        """Compute one passage and keep it; whether there was room for it."""
        runner = self.scout.runner
        cache = runner.open(len(header) + len(tokens))
        self.under_way.add((tokens, tenant))
        try:
            weights = yield from self.scout.passage(cache, header, tokens)
            reading = self.keeper.passage(content, len(header), cache.arena, weights, tenant)
        finally:
            self.under_way.remove((tokens, tenant))
            runner.close(cache)
        return self.keeper.keep_passage(reading)
