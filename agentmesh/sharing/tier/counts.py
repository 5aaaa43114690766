"""What a process has done with a store, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """What a store did so far, in entries.

    Args:
        hits, misses: entries that were read, and those that were looked for in vain.
        stored, there, refused, failed: see ``disk.Put``; refused for want of room or because a better one is there.
        evicted: removed to keep the budget or because they were too old.
        damaged: set aside.
        dropped: never written, because too many others waited.
        read_bytes: of files that were read.
        written_bytes: of files that were written.
        trouble: the last thing that kept something from being written or found.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    there: int = 0
    refused: int = 0
    failed: int = 0
    evicted: int = 0
    damaged: int = 0
    dropped: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    trouble: str = ""

    @property
    def line(self) -> str:
        """One line for people."""
        read, wrote = f"{self.read_bytes / 2**20:.1f} MiB", f"{self.written_bytes / 2**20:.1f} MiB"
        line = f"store: {self.hits} entries read ({read}), {self.stored} written ({wrote})"
        lost = self.dropped + self.failed
        line += f", {lost} not written" if lost else ""
        line += f", {self.damaged} damaged ones set aside" if self.damaged else ""
        return f"{line}: {self.trouble}" if self.trouble else line
