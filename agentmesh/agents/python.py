"""``python``: runs the last code block it receives in the sandbox; its message is what the code printed."""

from __future__ import annotations

from typing import final

from agentmesh.agents.base import Agent, Answer, Turn
from agentmesh.config.mesh import PythonAgentSpec
from agentmesh.errors import RunError
from agentmesh.prompt import Content, ContentKind, said
from agentmesh.sandbox import CodeResult, Limits, last_code_block, run_code

NOTHING = "(no output)"


@final
class PythonAgent(Agent):
    """Executes code that other agents wrote. What the code does wrong is its message, not an error of the run."""

    def __init__(self, spec: PythonAgentSpec) -> None:
        self._limits = Limits(time_s=spec.time_limit, memory_bytes=spec.memory_limit)
        self._tests = spec.tests

    async def act(self, turn: Turn) -> Answer:
        """Run the newest code block of the inbox, and the tests behind it.

        Raises:
            RunError: no message holds a code block.
            SandboxError: the code could not be started.
        """
        blocks = [block for message in turn.inbox if (block := last_code_block(message.text)) is not None]
        if not blocks:
            raise RunError(
                f"none of {len(turn.inbox)} messages holds a code block between ``` fences; ask the writer for one"
            )
        code = blocks[-1] if self._tests is None else f"{blocks[-1]}\n\n{turn.inputs[self._tests].text}\n"
        result = await run_code(code, self._limits)
        text = report(result, self._limits)
        if self._tests is not None and result.completed:
            text = "All tests passed." if text == NOTHING else f"{text}\nAll tests passed."
        return Content(text, ContentKind.RESULT, said(ContentKind.RESULT, turn.node, turn.round))


def report(result: CodeResult, limits: Limits) -> str:
    """What a person would see: the output, and how the code ended where it did not end well."""
    parts = [result.stdout.rstrip()]
    if result.timed_out:
        parts.append(f"(stopped after {limits.time_s:g} s)")
    elif result.truncated:
        parts.append("(stopped: too much output)")
    elif not result.completed:
        parts.append(result.stderr.strip() or f"(ended early with exit code {result.exit_code})")
    return "\n".join(part for part in parts if part) or NOTHING
