"""The text of parts of a prompt, whatever tokens it is cut between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from agentmesh.prompt.render import ChatTokenizer
from agentmesh.prompt.segments import Prompt, Segment

UNFINISHED = "\ufffd"
GUARD = "."


def texts_of(prompt: Prompt, sizes: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """The text of each run of a prompt's tokens; all of them together are the prompt's text.

    A character whose tokens are in two runs belongs to the run in which it is finished.

    Args:
        prompt: the prompt.
        sizes: tokens of each run, segment by segment: none goes over a segment's end, an empty segment has one of size
            zero.
        tokenizer: what the prompt was tokenised with.
    """
    assert sum(sizes) == len(prompt.tokens), "a plan covers its prompt"
    found: list[str] = []
    left = list(reversed(sizes))
    for segment in prompt.segments:
        runs = [left.pop()]
        while sum(runs) < len(segment.tokens):
            runs.append(left.pop())
        found += _split(segment, runs, tokenizer)
    return found


def _split(segment: Segment, runs: Sequence[int], tokenizer: ChatTokenizer) -> list[str]:
    """A segment's text in pieces. Decoded behind a guard: some tokenizers drop a space from what they begin with."""
    guard = tokenizer.encode(GUARD, control=False) if len(runs) > 1 else []
    head = len(tokenizer.decode(guard))
    cuts, at, begin, before = [0], 0, 0, 0
    for size in runs[:-1]:
        at += size
        text = tokenizer.decode([*guard, *segment.tokens[begin:at]])[head:]
        whole = text.rstrip(UNFINISHED)
        cuts.append(min(max(before + len(whole), cuts[-1]), len(segment.text)))
        if whole == text:
            begin, before = at, before + len(text)
    cuts.append(len(segment.text))
    return [segment.text[low:high] for low, high in pairwise(cuts)]
