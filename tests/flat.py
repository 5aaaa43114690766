"""Many questions through one mesh with the embedded model: memory stays flat, and whoever can share shares.

    make flat DATA=gsm8k-dev.jsonl             # or: python tests/flat.py --data gsm8k-dev.jsonl --limit 300

Messages have 8 tokens, so most of the time goes into reading, keeping and learning. A line every 20 questions; what is
wrong ends it with a message that says what, and exit code 1.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil
from soak import backend_of, held

from agentmesh import Mesh
from agentmesh.bench.data import read_questions
from agentmesh.results import RunResult

ROOT = Path(__file__).parents[1]
AT_ONCE = 20
SETTLED = 100
"""Questions after which nothing may grow any more."""

GROWTH_BYTES = 32 * 2**20
SHARE = 0.95
AGENTS = ("agent.1", "agent.2", "agent.3")
OVERRIDES = (
    "communicator=linear",
    "communicator.cost_gate=false",
    *(f"agents.{agent}.generate.max_tokens=8" for agent in AGENTS),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all questions; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSONL file with a question on each line")
    parser.add_argument("--limit", type=int, default=300)
    given = parser.parse_args(arguments)
    if given.limit <= SETTLED:
        parser.error(f"--limit {given.limit}: memory is judged behind the first {SETTLED} questions; ask for more")
    questions = [{"question": question.text} for question in read_questions(given.data, given.limit)[: given.limit]]
    results: list[RunResult] = []
    sizes: list[int] = []
    with Mesh.from_yaml(ROOT / "configs" / "math-fully-connected.yaml", overrides=OVERRIDES) as mesh:
        backend = backend_of(mesh)
        for low in range(0, len(questions), AT_ONCE):
            results += asyncio.run(mesh.arun_all(questions[low : low + AT_ONCE]))
            sizes.append(held(psutil.Process()))
            kept = backend.communicator.nbytes / 2**20
            print(f"{len(results):4d} questions: {sizes[-1] / 2**20:.0f} MiB, kept {kept:.1f} MiB", flush=True)
    return _judge(results, sizes)


def _judge(results: Sequence[RunResult], sizes: Sequence[int]) -> int:
    """Print what was found; 1 where it is not what was expected."""
    calls = [call for result in results[SETTLED:] for call in result.calls if call.slot_tokens]
    shared = sum(call.placed_slots > 0 for call in calls)
    why = Counter(str(row.reason) for call in calls if not call.placed_slots for row in call.plan)
    grown = max(sizes[SETTLED // AT_ONCE :]) - sizes[SETTLED // AT_ONCE - 1]
    print(
        f"behind the first {SETTLED} questions: {grown / 2**20:+.1f} MiB, {shared} of {len(calls)} calls shared {why}"
    )
    if grown > GROWTH_BYTES:
        print(f"memory grows: by {grown:,} bytes, expected at most {GROWTH_BYTES:,}")
    if shared < SHARE * len(calls):
        print(f"too few calls share: {shared} of {len(calls)}, expected {SHARE:.0%}")
    return int(grown > GROWTH_BYTES or shared < SHARE * len(calls))


if __name__ == "__main__":
    sys.exit(main())
