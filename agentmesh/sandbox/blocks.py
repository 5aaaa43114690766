"""Finds the code in a model's message; knows nothing about running it."""

from __future__ import annotations

import re
import textwrap

FENCE = re.compile(r"^[ \t]*(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)$")
PYTHON = frozenset({"python", "python3", "py"})


def last_code_block(text: str) -> str | None:
    """The last fenced block marked ``python`` or ``py``, else the last unmarked one; None where there is none.

    Models often show a program's output in an unmarked block after the program, so a marked block wins. Blocks
    marked as another language and empty blocks are passed over. A block without a closing fence runs to the next
    opening fence or to the end of the text.
    """
    last: dict[bool, str] = {}
    mark, language, lines = "", "", list[str]()

    def close() -> None:
        code = textwrap.dedent("\n".join(lines)).strip("\n")
        if mark and code.strip() and (language in PYTHON or not language):
            last[bool(language)] = code + "\n"
        lines.clear()

    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence is None or (mark and not _ends_or_starts(fence, mark)):
            lines.append(line)
            continue
        close()
        ends = bool(mark) and not fence["info"].strip()
        mark = "" if ends else fence["mark"]
        language = "" if ends else (fence["info"].lower().split() or [""])[0]
    close()
    return last.get(True, last.get(False))


def _ends_or_starts(fence: re.Match[str], mark: str) -> bool:
    """Whether a fence inside an open block ends it (same character, at least as long) or starts the next one."""
    return fence["mark"].startswith(mark)
