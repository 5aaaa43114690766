"""The files of a store: named by the sha256 of their bytes, written whole or not at all, set aside when damaged.

    FOLDER/index.sqlite                             what there is (``index.py``); made again if it is lost
    FOLDER/tenants/default/DIGEST.safetensors       the entries of runs without a tenant
    FOLDER/tenants/tenant-NAME/DIGEST.safetensors   those of a tenant
    FOLDER/partial/PID-DIGEST                       a file that a process is writing now
    FOLDER/quarantine/                              what was damaged or foreign; nobody reads it

Because its name is its digest, a file needs no other witness of what it should hold: a flipped byte, a cut end or a
file under another name shows when it is read, also where the index is lost. It knows no tensors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SUFFIX = ".safetensors"
DIGEST = r"[0-9a-f]{64}"
DEFAULT, OF_TENANT = "default", "tenant-"


class DamagedError(Exception):
    """A file is not what its name says; nobody outside a store sees this."""


@dataclass(frozen=True)
class Stored:
    """One file of a store: its tenant, digest, bytes, and when it was written."""

    tenant: str
    digest: str
    nbytes: int
    written: float


def digest_of(data: bytes) -> str:
    """The name that bytes are kept under."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Folder:
    """A store's folder. Every method may raise ``OSError``.

    Args:
        root: its path.
    """

    root: Path

    @property
    def index(self) -> Path:
        """Where the index lies."""
        return self.root / "index.sqlite"

    @property
    def partial(self) -> Path:
        """Where files are written before they get their name."""
        return self.root / "partial"

    @property
    def quarantine(self) -> Path:
        """Where damaged and foreign files are set aside."""
        return self.root / "quarantine"

    def prepare(self) -> None:
        """Make what is missing; only this user can look into it."""
        for path in (self.root, self.root / "tenants", self.partial, self.quarantine):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, tenant: str, digest: str) -> Path:
        """Where an entry lies or will lie."""
        name = OF_TENANT + tenant if tenant else DEFAULT
        return self.root / "tenants" / name / f"{digest}{SUFFIX}"

    def write(self, tenant: str, digest: str, data: bytes) -> None:
        """Write bytes under their digest: after a crash the file is there whole, or not at all."""
        path, partial = self.path(tenant, digest), self.partial / f"{os.getpid()}-{digest}"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)

    def read(self, tenant: str, digest: str, nbytes: int) -> bytes:
        """The bytes of an entry that should have so many.

        Raises:
            FileNotFoundError: it is gone.
            DamagedError: they are not what the name says.
        """
        with self.path(tenant, digest).open("rb") as file:
            data = file.read(nbytes + 1)
        if len(data) != nbytes or digest_of(data) != digest:
            raise DamagedError(f"its first {len(data)} bytes, of {nbytes}, do not have this digest")
        return data

    def head(self, tenant: str, digest: str, size: int) -> bytes:
        """The first bytes of an entry, unchecked."""
        with self.path(tenant, digest).open("rb") as file:
            return file.read(size)

    def remove(self, tenant: str, digest: str) -> None:
        """Delete an entry, if it is there."""
        self.path(tenant, digest).unlink(missing_ok=True)

    def set_aside(self, path: Path) -> None:
        """Move a file, or a folder, to the quarantine."""
        self.quarantine.mkdir(mode=0o700, exist_ok=True)
        target = self.quarantine / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)

    def entries(self) -> Iterator[Stored]:
        """All entries' files; whatever else lies among them is set aside."""
        for place in sorted((self.root / "tenants").iterdir()):
            tenant = "" if place.name == DEFAULT else place.name.removeprefix(OF_TENANT)
            if not place.is_dir() or tenant == place.name:
                with suppress(OSError):
                    self.set_aside(place)
                continue
            for path in sorted(place.iterdir()):
                if not path.is_file() or not re.fullmatch(DIGEST + re.escape(SUFFIX), path.name):
                    with suppress(OSError):
                        self.set_aside(path)
                    continue
                with suppress(FileNotFoundError):  # another process removed it just now
                    facts = path.stat()
                    yield Stored(tenant, path.name.removesuffix(SUFFIX), facts.st_size, facts.st_mtime)

    def sweep(self) -> None:
        """Remove what processes that are gone were writing."""
        for path in self.partial.iterdir():
            owner = path.name.partition("-")[0]
            if not owner.isdecimal() or not psutil.pid_exists(int(owner)):
                with suppress(FileNotFoundError):
                    path.unlink()

    def overhead(self) -> int:
        """Bytes of everything that is no entry."""
        index = [self.index.with_name(self.index.name + end) for end in ("", "-wal", "-shm")]
        return sum(map(_size, index)) + _size(self.partial) + _size(self.quarantine)

    def empty_quarantine(self) -> None:
        """Delete what was set aside."""
        for path in self.quarantine.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def set_aside_count(self) -> int:
        """How many files lie in quarantine."""
        return sum(1 for _ in self.quarantine.iterdir()) if self.quarantine.is_dir() else 0


def _size(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else (path,):
        with suppress(FileNotFoundError):
            total += file.stat().st_size if not file.is_dir() else 0
    return total


def _fsync_folder(path: Path) -> None:
    """Bring a rename to the disk."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
