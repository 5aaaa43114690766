"""What processes that share one persistent store do until they are killed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from killing import die_before

from agentmesh import Mesh
from agentmesh.communicator.measures import Costs
from agentmesh.local import LocalBackend
from agentmesh.sharing.tier.disk import DiskStore

FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir"})
BUDGET = 4 * 2**20
QUESTIONS = 8
"""So many that the budget cannot hold what is kept of all, and something is always written and removed."""

PROMPT = "{{ question }}\n{% for m in inbox %}\n{{ m.role }}:\n{{ m }}\n{% endfor %}\nGo on."
PRESETS = ("prefix", "rotate")


def team(preset: str, store: Path | None, **extra: Any) -> Mesh:
    """Two agents on a tiny random model; the second one reads what the first one wrote."""
    agents = {
        f"agent.{n}": {
            "role": f"Role {n}",
            "system": f"You are number {n}. " * 4,
            "prompt": PROMPT,
            "generate": {"max_tokens": 8},
        }
        for n in (1, 2)
    }
    keeps = {} if store is None else {"store": {"path": str(store), "budget": BUDGET}}
    return Mesh(
        agents=agents,
        topology={"use": "fully-connected", "agents": 2},
        model="random:tiny-llama",
        communicator={"preset": preset, "max_kl": 1e6, "audit": 0.0, "warmup": 2, **keeps, **extra},
        run={"concurrency": 1},
    )


def question(number: int) -> str:
    return f"Question {number}: " + " ".join(f"word{number * 7 + i}" for i in range(60))


def texts(mesh: Mesh, number: int, tenant: str = "") -> list[str]:
    return [message.text for message in mesh.run(question=question(number), tenant=tenant).messages]


def ask(folder: str, store: str, preset: str, seed: int, runs: int, operation: int | None) -> None:
    """Run a mesh with a store and write down every answer; killed right before a file operation in it, if told so."""
    die_before(operation, store, FILE_EVENTS)
    Costs.placing_pays = lambda _self, _tokens: True  # type: ignore[method-assign]  # this process is the test's own
    draw = random.Random(seed)
    with team(preset, Path(store)) as mesh, (Path(folder) / f"{seed}.jsonl").open("a") as file:
        backend = mesh.load()
        assert isinstance(backend, LocalBackend)
        assert backend.kept is not None
        for _ in range(runs):
            number, tenant = draw.randrange(QUESTIONS), draw.choice(["", "t"])
            said = texts(mesh, number, tenant)
            backend.kept.writer.drain()
            file.write(json.dumps([preset, number, said, backend.kept.store.counts.hits]) + "\n")
            file.flush()


def hammer(path: str, seed: int, rounds: int, budget: int) -> None:
    """Put, read, touch, clear and collect at random; every answer must be right."""
    from test_tier import found, record

    draw, store = random.Random(seed), DiskStore(Path(path), budget)
    for _ in range(rounds):
        name, tenant = f"r{draw.randrange(30)}", draw.choice(["", "t"])
        what = draw.random()
        if what < 0.5:
            store.put(record(name, draw.choice([100, 20_000, 60_000]), tenant))
        elif what < 0.9:
            found(store, name, tenant)
        elif what < 0.95:
            store.close()
            store = DiskStore(Path(path), budget)
        elif what < 0.98:
            store.collect()
        else:
            store.clear(tenant)
    assert store.counts.damaged == 0
    store.close()
