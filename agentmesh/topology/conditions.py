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
WORDS = (ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.IfExp, ast.Call, ast.Name, ast.Constant)
OPERATORS = (
    *(ast.Not, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn),
)
ALLOWED = (*WORDS, *OPERATORS, ast.And, ast.Or, ast.Load, ast.Mod)


def check(expression: str) -> None:
    """Refuse an expression that could not be evaluated.

    Raises:
        TopologyError: bad syntax, or a name or construct that conditions do not have.
    """
    try:
        parts = list(ast.walk(ast.parse(expression.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise TopologyError(f"condition {expression!r} is not an expression: {error}. {_help()}") from error
    foreign = [part for part in parts if not isinstance(part, ALLOWED)]
    if foreign:
        raise TopologyError(f"condition {expression!r}: found {type(foreign[0]).__name__.lower()}. {_help()}")
    called = {id(part.func) for part in parts if isinstance(part, ast.Call)}
    for part in parts:
        if isinstance(part, ast.Call) and (not isinstance(part.func, ast.Name) or part.keywords or len(part.args) != 1):
            raise TopologyError(f"condition {expression!r}: a call is a function's name and one text. {_help()}")
        known = FUNCTIONS if id(part) in called else NAMES
        if isinstance(part, ast.Name) and part.id not in known:
            hint = did_you_mean(part.id, known)
            raise TopologyError(f"condition {expression!r}: {part.id!r} is not known here.{hint} {_help()}")
    holds(expression, text="", role="", node="", round_=1, tokens=1)


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
    operators = {kind: simpleeval.DEFAULT_OPERATORS[kind] for kind in OPERATORS} | {ast.Mod: _remainder}
    try:
        return bool(simpleeval.SimpleEval(operators, functions, names).eval(expression.strip()))
    except (simpleeval.InvalidExpression, SyntaxError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise TopologyError(f"condition {expression!r} cannot be evaluated: {error}. {_help()}") from error
    except RecursionError as error:
        raise TopologyError(f"condition {expression!r} is nested too deeply. {_help()}") from error


def _remainder(left: float, right: float) -> float:
    """``left % right`` for numbers; text formatting could fill the memory."""
    if isinstance(left, str):
        raise TypeError("% takes numbers")
    return left % right


def _help() -> str:
    return (
        f"Conditions know the names {listing(NAMES)}, the functions {listing(FUNCTIONS)} (each of one text), "
        "and, or, not, comparisons, in, + - * / // %"
    )
