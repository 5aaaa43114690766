"""``vote``: answers with the answer that most messages of its inbox give."""

from __future__ import annotations

import re
from collections import Counter
from typing import final

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.config.mesh import VoteAgentSpec
from agentmesh.errors import RunError


@final
class VoteAgent(Agent):
    """Counts votes; the earliest of equally frequent answers wins."""

    def __init__(self, spec: VoteAgentSpec) -> None:
        self._pattern = re.compile(spec.extract) if spec.extract else None

    async def act(self, turn: Turn) -> Answer:
        """The most frequent answer.

        Raises:
            RunError: no message holds a vote.
        """
        votes = [vote for message in turn.inbox if (vote := self._vote(message.text))]
        if not votes:
            sought = f"matches {self._pattern.pattern!r}" if self._pattern else "has any text"
            raise RunError(f"none of {len(turn.inbox)} messages {sought}, so there is nothing to count")
        return Counter(votes).most_common(1)[0][0]

    def _vote(self, text: str) -> str:
        if self._pattern is None:
            return text.strip()
        found = list(self._pattern.finditer(text))
        if not found:
            return ""
        last = found[-1]
        return (last[1] if last.re.groups else last[0]).strip()
