"""Edge conditions: a small, safe expression over the message that would go along the edge."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

import simpleeval

from agentmesh.errors import TopologyError, did_you_mean, listing

NAMES = ("node", "role", "round", "text", "tokens")
FUNCTIONS = ("contains", "matches", "startswith")


def check(expression: str) -> None:
    """Refuse an expression that could not be evaluated.

    Raises:
        TopologyError: bad syntax, or a name or construct that conditions do not have.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise TopologyError(f"condition {expression!r} is not an expression: {error}. {_help()}") from error
    known = {*NAMES, *FUNCTIONS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id not in known:
            hint = did_you_mean(node.id, known)
            raise TopologyError(f"condition {expression!r}: {node.id!r} is not known.{hint} {_help()}")
        if isinstance(node, ast.Attribute | ast.Subscript | ast.Lambda | ast.comprehension | ast.JoinedStr):
            raise TopologyError(f"condition {expression!r} uses {type(node).__name__.lower()}s. {_help()}")
    try:
        holds(expression, text="", role="", node="", round_=0, tokens=0)
    except TopologyError:
        raise
    except ArithmeticError as error:
        raise TopologyError(f"condition {expression!r} fails: {error}") from error


def holds(expression: str, *, text: str, role: str, node: str, round_: int, tokens: int) -> bool:
    """Whether a condition holds for a message.

    Args:
        expression: such as ``contains("REVISE") and round < 3``.
        text: the message.
        role: its sender's role.
        node: its sender.
        round_: the round it was sent in.
        tokens: its length.

    Raises:
        TopologyError: the expression cannot be evaluated.
    """
    functions: dict[str, Callable[[str], Any]] = {
        "contains": lambda part: part in text,
        "matches": lambda pattern: re.search(pattern, text) is not None,
        "startswith": lambda part: text.lstrip().startswith(part),
    }
    names = {"text": text, "role": role, "node": node, "round": round_, "tokens": tokens}
    try:
        return bool(simpleeval.SimpleEval(functions=functions, names=names).eval(expression.strip()))
    except (simpleeval.InvalidExpression, SyntaxError, TypeError, ValueError, re.error) as error:
        raise TopologyError(f"condition {expression!r} cannot be evaluated: {error}. {_help()}") from error


def _help() -> str:
    return f"Conditions know the names {listing(NAMES)} and the functions {listing(FUNCTIONS)}, each of one text"
