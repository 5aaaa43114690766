"""What a call teaches when its message is out, and how calls that reuse KV are checked (docs/method.md, 6.3).

A call that was computed whole is an observation of every block that might have been placed. A call that reused KV is
checked against a dense prefill, which is an observation, too. While a mesh is calibrated nothing is reused, so the
check goes the other way: the prompt is composed once more as it would be, and compared with what was computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch

from agentmesh.communicator.blocks import Brush, Decision, compose, head, without_base
from agentmesh.communicator.labels import Labels
from agentmesh.communicator.learner import Learner
from agentmesh.communicator.linkstate import shares
from agentmesh.communicator.measures import divergence
from agentmesh.communicator.picks import Picker
from agentmesh.config.presets import CommunicatorSpec, PresetSpec
from agentmesh.engine.cache import ArenaCache
from agentmesh.engine.composition import Composition
from agentmesh.engine.scout import Scout
from agentmesh.engine.slices import Slices
from agentmesh.kv.arena import Arena
from agentmesh.kv.rope import Rope
from agentmesh.metering import Audit
from agentmesh.prompt.segments import Prompt
from agentmesh.sharing.matching import Match, Relation


@final
@dataclass(frozen=True)
class Auditor:
    """Observes and checks calls, and notes what it finds with a learner.

    Args:
        spec: which blocks are long enough.
        choice: the preset's choices.
        learner: what is told.
        scout: runs prompts beside the live sequences.
        rope: the model's rotation.
        brush: paints what is placed.
        picker: picks what of that is computed.
    """

    spec: CommunicatorSpec
    choice: PresetSpec
    learner: Learner
    scout: Scout
    rope: Rope
    brush: Brush
    picker: Picker

    def observe(self, prompt: Prompt, decisions: Sequence[Decision], apart: frozenset[int], arena: Arena) -> None:
        """Learn from every match whose truth is in an exact arena, but for positions that are placed from elsewhere.

        Where that is all of a match, its last token teaches alone, so that its link gets warm as well: what little it
        says of others is shrunk away (``sharing/linear.py``).
        """
        for match in (taught for decision in decisions for taught in self._taught(prompt, decision.match)):
            if match.tokens >= self.spec.min_tokens:
                begin = match.start + min(head(self.choice.recompute, match), match.tokens - 1)
                base = match.cut(begin, match.stop)
                truth = arena.read_free(begin, match.stop, self.rope)
                own = [p for p in range(begin, match.stop) if p not in apart] or [match.stop - 1]
                index = torch.tensor(own, device=truth.keys.device) - begin
                numbers = [position - match.start for position in own]
                self.learner.observe(prompt.reader, match, base.take(index), truth.take(index), numbers)

    def _taught(self, prompt: Prompt, match: Match) -> Iterator[Match]:
        """What a match teaches: its own link, and that of its later messages where these will be found apart.

        Along a line of agents each places once more what the one before it has placed. In a warm run the beginning of a
        long block, up to its message number ``max_depth``, is too deep in its last reading and comes from an earlier
        one; the messages behind it make a block of their own, or come from their writer where there is but one. While
        all is computed nothing is deep, so only this tells that block's link what it needs.
        """
        if shares(match.relation):
            yield match
        rest = match.behind(prompt, self.spec.max_depth) if match.relation is Relation.READ else None
        if rest is not None and rest.kind is not match.kind:
            yield rest

    def audit(
        self,
        prompt: Prompt,
        decisions: Sequence[Decision],
        apart: frozenset[int],
        cache: ArenaCache,
        logits: torch.Tensor,
    ) -> Slices[Audit]:
        """Check a call that reused KV, whose first token had ``logits [V]``, against a dense prefill in its cache."""
        wanted = yield from self.scout.composed(cache, Composition(prompt.tokens))
        self.observe(prompt, decisions, apart, cache.arena)
        return self._found(prompt, decisions, wanted, logits)

    def rehearse(
        self, prompt: Prompt, decisions: Sequence[Decision], cache: ArenaCache, wanted: torch.Tensor
    ) -> Slices[Audit | None]:
        """Check what placing would have made of a call that was computed whole; ``None`` where nothing may be placed.

        Args:
            prompt: the call's.
            decisions: what would be placed.
            cache: the call's.
            wanted: logits ``[V]`` of its first token.
        """
        if not any(decision.placed for decision in decisions):
            return None
        labels = Labels(prompt, {}, 0)
        self.brush.paint(labels, decisions, tuple(without_base(prompt, decisions)) if self.choice.repeats else ())
        looked = self.picker.pick(labels, (), decisions)
        if looked is not None:
            self.scout.runner.pool.give(looked)
        logits = yield from self.scout.composed(cache, compose(labels, (), decisions))
        return self._found(prompt, decisions, wanted, logits)

    def _found(
        self, prompt: Prompt, decisions: Sequence[Decision], wanted: torch.Tensor, logits: torch.Tensor
    ) -> Audit:
        kl = divergence(wanted[None], logits[None])
        flip = int(wanted.argmax()) != int(logits.argmax())
        placed = [(one.match, one.verdict.realigner) for one in decisions if one.shared and one.verdict.realigner]
        return self.learner.audited(prompt.reader, placed, float(kl[0]), flip=flip)
