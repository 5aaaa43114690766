"""What scorers share about text: the part after thinking, SQuAD's normal form, one-line notes."""

from __future__ import annotations

import re
import string

THOUGHT_END = "</think>"
NOTE_LENGTH = 200
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def final_text(answer: str) -> str:
    """What follows the last ``</think>`` of a thinking model; the whole answer of any other."""
    return answer.rpartition(THOUGHT_END)[2]


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no ASCII punctuation, no articles, single spaces."""
    bare = text.lower().translate(NO_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def contains(text: str, words: str) -> bool:
    """Whether ``words`` stand as whole words in ``text``, both in normal form; no words stand nowhere."""
    return bool(words) and f" {words} " in f" {text} "


def one_line(text: str) -> str:
    """A note: the text on one line, cut where it gets long."""
    line = " ".join(text.split())
    return line if len(line) <= NOTE_LENGTH else line[: NOTE_LENGTH - 1] + "…"
