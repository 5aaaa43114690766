"""The shelves: topologies, tasks and meshes by name, and the cache folder. Finds and copies files; reads none.

A name is looked up as an explicit path, then in each ``--library`` folder (the last one given wins), then
among the files shipped with agentmesh. A task is a folder with a ``task.yaml``, everything else is one file.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from agentmesh.errors import NotFoundError, UsageError, did_you_mean, listing

KINDS = ("topologies", "tasks", "configs")
SINGULAR = {"topologies": "topology", "tasks": "task", "configs": "config"}
SUFFIXES = (".yaml", ".yml")
SHOWN = 80
HERE = Path(__file__).resolve().parent


def cache_root() -> Path:
    """The user's cache folder: ``AGENTMESH_CACHE``, else the platform's usual place."""
    if chosen := os.environ.get("AGENTMESH_CACHE"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "agentmesh"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "agentmesh"


def shipped(kind: str) -> Path:
    """Folder of the shipped ``kind``: inside the wheel, or beside the package in a checkout.

    Raises:
        NotFoundError: there is no such shelf.
    """
    if kind not in KINDS:
        raise NotFoundError(f"no shelf named {kind!r}; expected one of: {listing(KINDS)}.{did_you_mean(kind, KINDS)}")
    inside, beside = HERE / kind, HERE.parent / kind
    return inside if inside.is_dir() else beside


def find(kind: str, name: str, *, libraries: Sequence[Path] = (), beside: Path | None = None) -> Path:
    """The file that ``name`` stands for.

    Args:
        kind: shelf to look on: topologies, tasks or configs.
        name: a name such as ``debate``, or a path (with a ``/``, or ending in .yaml or .yml).
        libraries: folders to search before the shipped one; later ones win.
        beside: folder of the file that uses the name; explicit paths are tried there before the working folder.

    Raises:
        NotFoundError: nothing matches; the message lists what exists.
    """
    if _is_path(name):
        for folder in (beside, Path()):
            found = None if folder is None else _match(kind, folder / Path(name).expanduser())
            if found is not None:
                return found
    for shelf in _shelves(kind, libraries):
        found = _match(kind, shelf / name) if name else None
        if found is not None:
            return found
    raise _miss(kind, name, libraries, beside)


def names(kind: str, libraries: Sequence[Path] = ()) -> dict[str, Path]:
    """Every name on the shelf with the file it stands for, sorted; libraries hide shipped files of the same name."""
    found: dict[str, Path] = {}
    for shelf in _shelves(kind, libraries):
        if shelf.is_dir():
            for path in sorted(shelf.iterdir()):
                match = _match(kind, path)
                if match is not None:
                    found.setdefault(path.stem if match == path else path.name, match)
    return dict(sorted(found.items()))


def copy(kind: str, name: str, destination: Path, *, libraries: Sequence[Path] = ()) -> Path:
    """Copy what ``name`` stands for, a file or a task's folder, and never overwrite.

    Args:
        kind: shelf to look on.
        name: what to copy.
        destination: an existing folder to copy into, or the new path.
        libraries: folders to search before the shipped one.

    Returns:
        The path of the copy.

    Raises:
        NotFoundError: nothing matches the name.
        UsageError: the target exists, or cannot be written.
    """
    source = find(kind, name, libraries=libraries)
    if source.name == _index(kind):
        source = source.parent
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise UsageError(f"{target} exists already; remove it, or give another destination")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    except OSError as error:
        raise UsageError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _is_path(name: str) -> bool:
    return "/" in name or "\\" in name or name.endswith(SUFFIXES)


def _index(kind: str) -> str:
    return f"{SINGULAR[kind]}.yaml"


def _match(kind: str, path: Path) -> Path | None:
    """The file meant by ``path``: itself, with a suffix added, or the index file of a task's folder."""
    if path.name.endswith(SUFFIXES):
        return path if _is_file(path) else None
    candidates = [path.with_name(path.name + suffix) for suffix in SUFFIXES] if path.name else []
    if kind == "tasks":
        candidates.append(path / _index(kind))
    return next((candidate for candidate in candidates if _is_file(candidate)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, an unreadable folder, a NUL
        return False


def _shelves(kind: str, libraries: Sequence[Path]) -> list[Path]:
    shelves: list[Path] = []
    for library in reversed(libraries):
        if not library.is_dir():
            raise NotFoundError(f"--library {library}: no such folder")
        if (library / kind).is_dir():
            shelves.append(library / kind)
        if not any((library / each).is_dir() for each in KINDS):
            shelves.append(library)
    return [*shelves, shipped(kind)]


def _miss(kind: str, name: str, libraries: Sequence[Path], beside: Path | None) -> NotFoundError:
    choices = names(kind, libraries)
    name = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
    known = f"known {kind}: {listing(choices)}.{did_you_mean(name, choices)}"
    if not _is_path(name):
        return NotFoundError(f"no {SINGULAR[kind]} named {name!r}; {known}")
    base = Path() if beside is None else beside
    what = "is a folder, expected a file" if (base / name).is_dir() else "does not exist"
    return NotFoundError(f"{SINGULAR[kind]} file {name!r} {what}; {known}")
