"""What an endpoint counted of one call."""

from __future__ import annotations

from agentmesh.config.base import Frozen


class EndpointUsage(Frozen):
    """What an endpoint says of a call, in tokens; ``None`` where it does not say.

    ``cached_tokens`` of its ``prompt_tokens`` came from the endpoint's own cache. The call was sent ``attempts`` times.
    """

    url: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    attempts: int = 1

    @property
    def note(self) -> str:
        """How many tokens were cached there, for people; empty where the endpoint does not say."""
        return "" if self.cached_tokens is None else f"{self.cached_tokens} cached there"
