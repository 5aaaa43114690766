"""Which tokens of placed blocks are computed all the same, besides their heads and line breaks.

Of what an agent has read or written, a look at the cache picks a share, or the realigner does: what it would move
farthest, or has never seen the like of. Passages of a corpus, which nobody in the run has read, are the hard case:
there it is a larger share, and no look. What a token means to the rest of its passage is known since the passage was
ingested; what it means to the question is told by the words that both have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch

from agentmesh.communicator.blocks import Decision, compose, compose_whole, paint_best
from agentmesh.communicator.labels import Labels
from agentmesh.config.presets import BY_REALIGNER, Picking, Recompute
from agentmesh.engine.composition import Placement
from agentmesh.engine.scout import Look, Scout
from agentmesh.kv.arena import Arena
from agentmesh.prompt.segments import ContentKind, Prompt
from agentmesh.sharing.matching import Match, Relation

ASKED = 3.0
"""How much more a token counts that is the only one of its kind in the passages, and that the prompt asks for."""

AROUND = (-1, 0, 1, 2)
"""Tokens beside an asked one that count more with it: what stands around a name is what is said of it."""


@final
@dataclass(frozen=True)
class Picker:
    """Picks tokens to be computed.

    Args:
        recompute: how many, and by what.
        scout: looks at caches.
    """

    recompute: Recompute
    scout: Scout

    def can(self, match: Match) -> bool:
        """Whether what a match's picks go by is to be had with this model."""
        if self._by_weights(match):
            return match.reading.weights is not None
        looks = self.recompute.ratio > 0 and self.recompute.by not in BY_REALIGNER
        return not looks or self.scout.can(self.recompute.by)

    def pick(self, labels: Labels, lead: Sequence[Placement], decisions: Sequence[Decision]) -> Arena | None:
        """Label what is picked of placed blocks; the arena that a look has seen, if there was one."""
        placed = [number for number, one in enumerate(decisions) if one.shared]
        passages = [number for number in placed if self._by_weights(decisions[number].match)]
        if passages:
            scores = weigh(labels.prompt, [decisions[number].match for number in passages])
            paint_best(labels, passages, lambda tokens, _blocks: self.recompute.picked_of_passages(tokens), scores)
        others = [number for number in placed if number not in passages]
        if not others or not self.recompute.ratio:
            return None
        if self.recompute.by in BY_REALIGNER:
            scores = self._known(labels.prompt, [decisions[number] for number in others])
            paint_best(labels, others, self.recompute.picked, scores)
            return None
        look = self._look(labels, lead, decisions)
        paint_best(labels, others, self.recompute.picked, look.scores)
        return look.arena

    def about(self, placed: Sequence[tuple[Match, int]]) -> int:
        """How many tokens are picked of matches of which so many are placed."""
        passages = [tokens for match, tokens in placed if self._by_weights(match)]
        others = [tokens for match, tokens in placed if not self._by_weights(match)]
        picked = self.recompute.picked(sum(others), len(others))
        return picked + self.recompute.picked_of_passages(sum(passages))

    def _by_weights(self, match: Match) -> bool:
        return match.relation is Relation.CORPUS and bool(self.recompute.documents)

    def _known(self, prompt: Prompt, placed: Sequence[Decision]) -> torch.Tensor:
        """What their realigners know of the tokens of placed matches, fp32 ``[T]``."""
        scores = torch.zeros(len(prompt.tokens))
        for decision in placed:
            match, realigner = decision.match, decision.verdict.realigner
            assert realigner is not None, "a placed match has a realigner"
            asked = realigner.leverage if self.recompute.by is Picking.LEVERAGE else realigner.moves
            scores[match.start : match.stop] = asked(match.cut(match.start, match.stop), range(match.tokens)).cpu()
        return scores

    def _look(self, labels: Labels, lead: Sequence[Placement], decisions: Sequence[Decision]) -> Look:
        """What a look says of every position; an attention is watched over whole blocks, their heads included."""
        if self.recompute.by is Picking.DEVIATION:
            return self.scout.deviation(compose(labels, lead, decisions))
        last = max(low for low, _, label in labels.runs() if label.match >= 0)
        asking = [p for low, high, label in labels.runs(last) for p in range(low, high) if label.match < 0]
        return self.scout.attention(compose_whole(labels, lead, decisions), asking)


def weigh(prompt: Prompt, passages: Sequence[Match]) -> torch.Tensor:
    """What tokens of passages mean to the rest of them and to the prompt's other contents, fp32 ``[T]``.

    The former is a share of the passage's attention; it counts up to ``1 + ASKED`` times where the token stands beside
    one that another content has too, less where the passages have it often.
    """
    asked = {
        token
        for segment in prompt.segments
        if segment.content is not None and segment.content.kind is not ContentKind.DOCUMENT
        for token in segment.tokens
    }
    often = Counter(token for match in passages for token in prompt.tokens[match.start : match.stop])
    scores = torch.zeros(len(prompt.tokens))
    for match in passages:
        weights = match.reading.weights
        assert weights is not None, "passages without weights are not placed"
        boosts = torch.zeros(match.tokens)
        for place, token in enumerate(prompt.tokens[match.start : match.stop]):
            for near in (place + step for step in AROUND) if token in asked else ():
                if 0 <= near < match.tokens:
                    boosts[near] += 1 / often[token]
        share = weights[match.at : match.at + match.tokens].cpu() / weights.sum().cpu().clamp(min=torch.finfo().tiny)
        scores[match.start : match.stop] = share * (1 + ASKED * boosts)
    return scores
