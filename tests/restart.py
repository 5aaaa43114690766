"""What a restart costs, and what tenants can tell of each other: real processes, the embedded model, a store on disk.

    python tests/restart.py [--tokens 512] [--warm 6] [--repeat 5]

First a mesh of three agents under ``linear`` answers some questions with a store and ends. Then processes of their own
answer a new question: one that goes on without a pause (it answered the others itself), one that was restarted with the
store, one that never had one. Then the restarted mesh's tenants ask in turn: a question of their own, one that another
tenant has just asked, and one that they asked before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from agentmesh import Mesh
from agentmesh.results import RunResult

AGENTS = ("Solver", "Checker", "Sceptic")
PROMPT = "{{ question }}\n{% for m in inbox %}\n{{ m.role }} wrote:\n{{ m }}\n{% endfor %}\nAnswer in one sentence."
FACTS = "Crate {n} on pier {m} holds {k} nets, {j} ropes and a note for the harbour master about the weather. "


def question(number: int, tokens: int) -> str:
    """A text of about so many tokens that no other number gives."""
    pieces, text = 0, ""
    while len(text) < 4.2 * tokens:
        pieces += 1
        text += FACTS.format(n=number * 1000 + pieces, m=pieces % 7, k=pieces * number % 11, j=number)
    return f"{text}How many nets are in the first crate of list {number}?"


def team(store: Path | None) -> Mesh:
    """Three fully connected agents."""
    agents = {
        f"agent.{n}": {
            "role": role,
            "system": f"You are a {role} in a team that counts what lies in a harbour. " * 3,
            "prompt": PROMPT,
            "generate": {"max_tokens": 32},
        }
        for n, role in enumerate(AGENTS, 1)
    }
    spec: dict[str, Any] = {"preset": "linear", "audit": 0.0, "max_kl": 1e6}
    keeps = {} if store is None else {"store": str(store)}
    topology = {"use": "fully-connected", "agents": len(AGENTS)}
    return Mesh(agents=agents, topology=topology, model="smollm2-135m", communicator={**spec, **keeps})


def figures(result: RunResult) -> dict[str, Any]:
    """What the calls of one run shared, and how long their first tokens took."""
    calls = result.calls
    return {
        "prompt": sum(call.prompt_tokens for call in calls),
        "exact": sum(call.placed_exact for call in calls),
        "realigned": sum(call.placed_realigned for call in calls),
        "shareable": sum(call.slot_tokens for call in calls),
        "shared": sum(call.placed_slots for call in calls),
        "ttft_ms": [round(call.ttft_ms) for call in calls],
        "answer": result.answer,
    }


def work(role: str, store: Path, tokens: int, warm: int, repeat: int) -> dict[str, Any]:
    """What one process does."""
    with team(None if role in ("cold", "going-on") else store) as mesh:
        begun = time.perf_counter()
        mesh.load()
        loaded = time.perf_counter() - begun
        if role in ("learn", "going-on"):
            for number in range(warm):
                mesh.run(question=question(number, tokens))
        if role == "learn":
            return {}
        if role == "tenants":
            return tenants(mesh, tokens, repeat)
        mesh.run(question="What is a pier?")  # compiles nothing, but fills caches: every process does it
        return {"load_s": round(loaded, 2), **figures(mesh.run(question=question(99, tokens)))}


def tenants(mesh: Mesh, tokens: int, repeat: int) -> dict[str, Any]:
    """Medians of the first call's time to first token: of a new question, of another tenant's, of one's own."""
    found: dict[str, list[float]] = {"new": [], "another tenant's": [], "one's own": []}
    placed, computed = dict.fromkeys(found, 0), dict.fromkeys(found, 0)
    for number in range(repeat):
        mesh.run(question=question(200 + number, tokens), tenant="a")
        asked = [("another tenant's", 200 + number), ("new", 400 + number)]
        for name, which in [*asked[:: 1 if number % 2 else -1], ("one's own", 200 + number)]:
            time.sleep(1.0)  # until what was kept is written
            call = mesh.run(question=question(which, tokens), tenant="b").calls[0]
            found[name].append(call.ttft_ms)
            placed[name] += call.placed_slots
            computed[name] += call.computed
    return {
        name: {
            "ttft_ms": round(median(times)),
            "all": [round(ms) for ms in times],
            "question_placed": placed[name],
            "computed": computed[name],
        }
        for name, times in found.items()
    }


def child(role: str, store: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a process of its own finds."""
    line = [sys.executable, __file__, "--role", role, "--store", str(store)]
    sizes = ["--tokens", str(options.tokens), "--warm", str(options.warm), "--repeat", str(options.repeat)]
    done = subprocess.run([*line, *sizes], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, and print a line for each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of a question")
    parser.add_argument("--warm", type=int, default=6, help="questions that are answered first")
    parser.add_argument("--repeat", type=int, default=5, help="rounds of the tenants")
    parser.add_argument("--role", help="used by itself")
    parser.add_argument("--store", type=Path, help="used by itself")
    options = parser.parse_args()
    if options.role:
        print(json.dumps(work(options.role, options.store, options.tokens, options.warm, options.repeat)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "kv"
        found = {}
        for role in ("going-on", "learn", "restarted", "cold", "tenants"):
            found[role] = child(role, store, options)
            if role != "learn":
                print(f"{role}: {json.dumps(found[role])}", flush=True)
        size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    share = found["restarted"]["shared"] / max(found["going-on"]["shared"], 1)
    raw = found["restarted"]["shared"] / max(found["restarted"]["shareable"], 1)
    print(f"restarted shares {share:.1%} of what the running one shares, {raw:.1%} of all shareable tokens; ", end="")
    print(f"same answer: {found['restarted']['answer'] == found['going-on']['answer']}; store {size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
