"""``code``: whether a program passes its tests in the sandbox, and the estimator of pass@k.

A program is judged by its own process, and what runs there can forge anything it looks for hard enough: a value that
equals everything, a function of a library that it replaced, the text of the tests. What a model does without meaning to
cheat cannot pass: ending early, redefining ``check`` or a builtin that the tests use, text that swallows the tests.
Nor can a debugger's jump over the tests, or what searches frames and the garbage collector for the signs of success.
"""

from __future__ import annotations

import ast
import math
import re
import secrets
import textwrap
import warnings
from typing import final

from agentmesh.errors import UsageError
from agentmesh.sandbox import CodeResult, Limits, last_code_block, run_code
from agentmesh.suites.samples import Sample
from agentmesh.suites.scorers.base import Output, Scored, Scorer
from agentmesh.suites.scorers.text import final_text, one_line

LIMITS = Limits(time_s=10.0, memory_bytes=2**30, output_bytes=2**20)
LONGEST = 100_000  # characters of a solution; a longer one is no answer
CHECK = re.compile(r"^def check\(", re.MULTILINE)

# The tests get the solution's names, but no builtin that it redefined, neither in its module nor in ``builtins``.
# The steps are in the loop's iterator alone, out of reach of frames and variables; what could get at them all the same
# (tracing, the garbage collector, ctypes) is refused. The token is written by this program alone, after the tests.
PROGRAM = """
def steps():
    import builtins, functools, os, sys, types
    def refuse(event, _arguments):
        if event.startswith(("sys.settrace", "sys.setprofile", "sys.monitoring", "sys._current", "gc.get_", "ctypes.")):
            raise PermissionError(event + " is not for programs that are tested")
    def judge(code, names, genuine, run):
        vars(builtins).update(genuine)
        given = {{name: value for name, value in names.items() if name not in genuine or name == {entry!r}}}
        run(code, {{**given, "__name__": "tests", "__builtins__": builtins}})
    module = sys.modules["solution"] = types.ModuleType("solution")
    solution = compile({solution!r}, "solution.py", "exec")
    tests = compile({tests!r}, "tests.py", "exec")
    sys.addaudithook(refuse)
    return iter((
        functools.partial(exec, solution, vars(module)),
        functools.partial(judge, tests, vars(module), dict(vars(builtins)), exec),
        functools.partial(os.write, 1, {token!r}.encode()),
    ))
for step in steps():
    step()
"""


@final
class CodeScorer(Scorer):
    """Runs the last code block of an answer and then the sample's tests.

    Args:
        limits: of one run; 10 seconds and 1 GiB if ``None``.
    """

    metrics = ("pass@1",)
    runs_code = True

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or LIMITS

    async def score(self, sample: Sample, output: Output) -> Scored:
        """1 if the program runs to the end of its tests.

        Raises:
            SandboxError: nothing can be run on this machine.
        """
        block = written(output.answer, sample)
        solution = complete(block, sample)
        if solution is None:
            problem = "no code block in the answer" if not block else one_line(f"no Python: {_problem(block)}")
            return Scored(values={"pass@1": 0.0}, extracted=block, note=problem)
        token = secrets.token_hex(16)
        result = await run_code(program(solution, sample, token), self._limits)
        passed = result.completed and token in result.stdout
        note = "" if passed else one_line(_ending(result, self._limits))
        return Scored(values={"pass@1": float(passed)}, extracted=block, note=note)

    async def answer(self, sample: Sample, text: str) -> str:
        """The program without its comments and layout; nothing is run."""
        tree = _tree(complete(written(text, sample), sample) or "")
        return ast.unparse(tree) if isinstance(tree, ast.Module) else ""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` programs passes (Chen et al. 2021, eq. 1).

    Args:
        n: programs tried.
        c: how many of them passed.
        k: how many one would try.

    Raises:
        UsageError: more passed than were tried, or ``k`` is not between 1 and ``n``.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise UsageError(f"pass@k: found n={n}, c={c}, k={k}; expected 0 <= c <= n and 1 <= k <= n")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def program(solution: str, sample: Sample, token: str) -> str:
    """The solution and its tests as one program, which writes ``token`` at its very end."""
    tests = sample.tests
    if CHECK.search(tests):
        tests += f"\n\ncheck({sample.entry_point})\n"
    return PROGRAM.format(tests=tests, solution=solution, entry=sample.entry_point, token=token)


def written(answer: str, sample: Sample) -> str:
    """The code of an answer: its last block, or all of it where it is Python or goes on with the question's."""
    text = final_text(answer)
    if (block := last_code_block(text)) is not None:
        return block
    whole = text.strip("\n")
    return whole if whole.strip() and complete(whole, sample) is not None else ""


def complete(block: str, sample: Sample) -> str | None:
    """The block as a program that defines the entry point, with the question's signature if it ends in one.

    A block that defines it stands behind the question's code too, whose imports and helpers it may use. ``None``
    where nothing of this is Python.
    """
    if not block.strip() or len(block) > LONGEST:
        return None
    question = sample.question.rstrip()
    last = question.rpartition("\n")[2]
    indent = last[: len(last) - len(last.lstrip())] or "    "
    stub = f"{question}\n{indent}pass\n"
    tries = [block]
    if _last_function(stub) == sample.entry_point:
        bodies = [block, textwrap.indent(block, indent)]
        body = [f"{question}\n{each}" for each in (bodies if block[0].isspace() else bodies[::-1])]
        tries = [f"{stub}\n{block}", block] if sample.entry_point in _defined(block) else [*body, block]
    return next((each for each in tries if _problem(each) is None), None)


def _last_function(text: str) -> str | None:
    """The name of the function that a text ends in."""
    tree = _tree(text)
    last = tree.body[-1] if isinstance(tree, ast.Module) and tree.body else None
    return last.name if isinstance(last, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _defined(text: str) -> set[str]:
    """Names that a text defines at its top level."""
    tree = _tree(text)
    found = set()
    for node in tree.body if isinstance(tree, ast.Module) else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _problem(text: str) -> str | None:
    """Why a text is no Python; ``None`` where it is."""
    tree = _tree(text)
    if isinstance(tree, str):
        return tree
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(tree, "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return _said(error)
    return None


def _tree(text: str) -> ast.Module | str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the model's escapes
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return _said(error)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _ending(result: CodeResult, limits: Limits) -> str:
    """How a run that did not pass has ended."""
    if result.timed_out:
        return f"stopped after {limits.time_s:g} s"
    if result.truncated:
        return "stopped: too much output"
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines and result.exit_code else f"ended early with exit code {result.exit_code}"
