"""What a run gives back."""

from __future__ import annotations

from agentmesh.config.base import Frozen
from agentmesh.events import CallRecord, MessageRecord


class Usage(Frozen):
    """Tokens and time of one agent, or of a whole run. Times in milliseconds."""

    calls: int = 0
    prompt_tokens: int = 0
    placed_exact: int = 0
    placed_realigned: int = 0
    computed: int = 0
    output_tokens: int = 0
    ttft_ms: float = 0.0
    decode_ms: float = 0.0

    def plus(self, call: CallRecord) -> Usage:
        """This usage and one more call."""
        sums = {name: getattr(self, name) + getattr(call, name) for name in type(self).model_fields if name != "calls"}
        return Usage(calls=self.calls + 1, **sums)


class RunResult(Frozen):
    """A finished run.

    ``messages`` are in the order of the unrolled graph, ``calls`` (model calls only) in the order they ended.
    """

    answer: str
    messages: tuple[MessageRecord, ...]
    calls: tuple[CallRecord, ...]
    wall_s: float

    @property
    def usage(self) -> Usage:
        """The whole run's usage."""
        total = Usage()
        for call in self.calls:
            total = total.plus(call)
        return total

    @property
    def usage_by_agent(self) -> dict[str, Usage]:
        """Node → its usage."""
        found: dict[str, Usage] = {}
        for call in self.calls:
            found[call.node] = found.get(call.node, Usage()).plus(call)
        return found
