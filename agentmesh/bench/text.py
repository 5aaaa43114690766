"""English text without end for benchmarks: a harbour's ledger, different for every seed, the same for the same one."""

from __future__ import annotations

import random

from agentmesh.prompt import ChatTokenizer

BOATS = ("Heron", "Marigold", "Old Tom", "Swift", "Northern Star", "Patience", "Kestrel", "Blue Anchor", "Juniper")
PEOPLE = ("Ada", "Bram", "Captain Voss", "the clerk", "Ines", "the harbour master", "old Pieter", "Ruth", "a sailor")
GOODS = ("salt", "timber", "oranges", "wool", "copper wire", "tea", "slate", "barley", "lamp oil", "rope")
PLACES = ("the north quay", "the customs house", "the market", "Lock Street", "the dry dock", "the lighthouse")
SENTENCES = (
    "On day {day} the {boat} unloaded {n} crates of {good} at {place}, and {person} signed for {m} of them.",
    "{person} counted {n} barrels of {good} and found {m} fewer than the papers of the {boat} said.",
    "Because the wind turned, the {boat} waited {m} hours before {place} and paid {n} crowns for a pilot.",
    "If each crate of {good} weighs {m} kilograms, then {n} crates need a cart that carries {nm} kilograms.",
    "{person} asked whether the {boat} could take {n} sacks of {good} to the islands before day {day}.",
    "The price of {good} rose from {m} to {n} crowns, which {person} noted with a red pencil.",
    "Nobody at {place} had seen the {boat} since day {day}, although {person} was sure that it had left {good} there.",
    "After {m} days of rain, {person} moved {n} bales of {good} from {place} to a drier room.",
    "The council let {person} repair {place} for {n} crowns and asked for a report within {m} days.",
    "Half of the {n} passengers of the {boat} came for the fair; the others looked for work at {place}.",
)


WORDS_A_SENTENCE = 16
SENTENCES_AT_ONCE = 160
"""Tokenizers warn of texts that are longer than their model's context."""

PARAGRAPH = 2
"""Sentences in a paragraph; models write lines of about this length when they reason step by step."""


def english(seed: str, sentences: int) -> str:
    """So many sentences about the harbour, in paragraphs."""
    rng = random.Random(seed)  # noqa: S311  # text, no secrets
    found = []
    for _ in range(sentences):
        n, m = rng.randint(12, 960), rng.randint(2, 60)
        found.append(
            rng.choice(SENTENCES).format(
                day=rng.randint(1, 365),
                boat=rng.choice(BOATS),
                person=rng.choice(PEOPLE),
                good=rng.choice(GOODS),
                place=rng.choice(PLACES),
                n=n,
                m=m,
                nm=n * m,
            )
        )
    whole = [sentence[0].upper() + sentence[1:] for sentence in found]
    return "\n".join(" ".join(whole[low : low + PARAGRAPH]) for low in range(0, len(whole), PARAGRAPH))


def english_tokens(tokenizer: ChatTokenizer, seed: str, tokens: int) -> tuple[int, ...]:
    """So many tokens of English."""
    sentences = min(2 + tokens // WORDS_A_SENTENCE, SENTENCES_AT_ONCE)
    found = tokenizer.encode(english(seed, sentences), control=False)
    while len(found) < tokens:
        found += tokenizer.encode(" " + english(f"{seed} {len(found)}", 8), control=False)
    return tuple(found[:tokens])
