"""The house: imports only go down, the light path loads no torch, modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agentmesh

PACKAGE = Path(agentmesh.__file__).parent
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "config", "events", "jsonl", "library", "metering", "reasons", "stream", "results"}),
    frozenset({"kv", "topology", "prompt"}),
    frozenset({"sharing", "backend", "graphview"}),
    frozenset({"engine"}),
    frozenset({"communicator"}),
    frozenset(
        {
            "agents",
            "sandbox",
            "blueprint",
            "forecast",
            "foreseen",
            "scheduler",
            "turns",
            "calls",
            "checks",
            "workers",
            "local",
            "executors",
            "mesh",
            "models",
            "named",
            "parts",
            "planned",
            "remote",
            "record",
            "runner",
            "testing",
        }
    ),
    frozenset({"bench", "display", "evaluate", "serve", "suites", "tables", "plots"}),
    frozenset({"cli", "__main__"}),
)
HALVES = ({"kv"}, {"topology", "prompt"})
TORCH_ALLOWED = {"kv", "sharing", "engine", "communicator", "local", "planned", "bench"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)
MODULE_LIMIT, FUNCTION_LIMIT = 400, 80


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(part: str) -> int:
    found = [index for index, floor in enumerate(FLOORS) if part in floor]
    assert found, f"agentmesh/{part} stands on no floor; add it to FLOORS"
    return found[0]


def imports(path: Path) -> set[str]:
    """Absolute names that a module imports, late imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    mine = part_of(path)
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("agentmesh.")}
    upward = [part for part in parts - {mine} if floor_of(part) > floor_of(mine)]
    across = [half for half in HALVES if mine in half]
    other = {part for half in HALVES for part in half} - (across[0] if across else set())

    assert not upward
    assert not across or not parts & other


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_on_their_floors(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(path)}
    late = part_of(path) == "cli"

    assert "transformers" not in names or part_of(path) == "engine"
    assert "torch" not in names or part_of(path) in TORCH_ALLOWED or late


def test_the_light_path_loads_no_torch() -> None:
    slow = ("torch", "transformers", "bm25s", "fastapi", "uvicorn", "httpx2", "ray")
    code = f"import sys, agentmesh.cli; print([m for m in {slow} if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_modules_and_functions_stay_small() -> None:
    sizes, functions = [], []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(PACKAGE))
        sizes.append((text.count("\n"), name))
        functions += [
            ((node.end_lineno or 0) - node.lineno + 1, f"{name}:{node.name}")
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    print(f"{len(sizes)} modules, {sum(size for size, _ in sizes)} lines")
    print("largest modules:", *sorted(sizes)[-5:][::-1])
    print("longest functions:", *sorted(functions)[-5:][::-1])

    assert max(sizes)[0] <= MODULE_LIMIT, max(sizes)
    assert max(functions)[0] <= FUNCTION_LIMIT, max(functions)


def test_the_public_names_are_sorted_and_there() -> None:
    assert agentmesh.__all__ == sorted(agentmesh.__all__)
    assert all(name in vars(agentmesh) for name in agentmesh.__all__)
    public = {name for name in vars(agentmesh) if not name.startswith("_")}
    modules = {part_of(path) for path in MODULES}
    assert public - modules - {"annotations"} == set(agentmesh.__all__)


def test_no_module_has_broad_excepts_or_left_over_marks() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in ("everything", "Exception", "BaseException"), f"{path}:{node.lineno}"
        assert not {"TODO", "FIXME", "XXX"} & set(text.replace(":", " ").split()), path


def test_every_realigner_that_a_mesh_can_name_is_there() -> None:
    from agentmesh.communicator import unlearned
    from agentmesh.config.presets import RealignerKind
    from agentmesh.kv.arena import KVShape
    from agentmesh.sharing.realigner import Realigner

    shape = KVShape(2, 2, 8, torch.float32, torch.device("cpu"))
    for kind in set(RealignerKind) - {RealignerKind.ANCHORS}:
        made = unlearned(kind)(shape)
        assert isinstance(made, Realigner)
        assert not made.observations
        assert made.needs_warmup is kind.learns
