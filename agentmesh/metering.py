"""What is measured beside a call: what its endpoint counted, an audit of what was reused, a judge's second answer."""

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


class Audit(Frozen):
    """One reusing call checked against a dense prefill of the same prompt (docs/method.md, 6.3).

    ``kl`` of the next-token distributions, dense against reuse, in nats; ``flip`` says whether the most likely token
    differs; ``above`` names links whose audits pass the limits with this one, ``opened`` those of them whose breaker it
    opened: none where nothing is learned any more, as in evaluations.
    """

    kl: float
    flip: bool
    opened: tuple[str, ...] = ()
    above: tuple[str, ...] = ()


class CheckRecord(Frozen):
    """What a judge said when it was asked once more with its inbox in another order.

    ``order``: for each message as it was shown then, its place in the inbox before. ``placed`` and ``computed`` count
    the prompt's tokens, ``ms`` is how long it took. A check that failed has an ``error`` and no text.
    """

    node: str
    round: int
    order: tuple[int, ...]
    text: str = ""
    placed: int = 0
    computed: int = 0
    ms: float = 0.0
    error: str = ""
