"""API keys and the tenants they stand for."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agentmesh.config.base import TENANT
from agentmesh.errors import InputError, UsageError

VARIABLE = "AGENTMESH_API_KEYS"
METRICS = "metrics"
"""The tenant whose keys read the metrics, and nothing else."""

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")
SHORTEST = 16


@dataclass(frozen=True)
class Keys:
    """Digest of a key → its tenant. Without keys everybody is the tenant ``""``."""

    tenants: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tenants)

    def tenant(self, authorization: str) -> str | None:
        """Whose key an ``Authorization`` header holds; ``None`` for nobody's."""
        scheme, _, key = authorization.partition(" ")
        return self.tenants.get(_digest(key.strip())) if scheme.lower() == "bearer" else None


def read_keys(file: Path | None, variable: str | None) -> Keys:
    """The keys of a file and of an environment variable's text.

    Args:
        file: ``tenant key`` on each line, ``#`` begins a comment; ``sha256:…`` stands for a key of that digest.
        variable: the same, with commas for line ends.

    Raises:
        InputError: the file cannot be read or holds no key, an entry is no tenant and key, or a key stands for two
            tenants; keys are never repeated in messages.
    """
    lines: list[tuple[str, str]] = []
    if file is not None:
        try:
            lines += [(f"{file}:{n}", line) for n, line in enumerate(file.read_text("utf-8").splitlines(), 1)]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: the keys cannot be read: {error}") from error
    if file is not None and not list(_parsed(lines)):
        raise InputError(
            f"{file}: holds no key, so everybody on this machine would be let in; leave --keys out for that"
        )
    lines += [(f"{VARIABLE}, entry {n}", entry) for n, entry in enumerate((variable or "").split(","), 1)]
    tenants: dict[str, str] = {}
    for place, digest, tenant in _parsed(lines):
        other = tenants.setdefault(digest, tenant)
        if other != tenant:
            raise InputError(f"{place}: the key of {tenant} is that of {other}, too; a key stands for one tenant")
    return Keys(tenants)


def _parsed(lines: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str, str]]:
    """Place, digest and tenant of each key."""
    for place, line in lines:
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not re.fullmatch(TENANT, words[0]):
            raise InputError(f"{place}: expected a tenant's name and a key, separated by a space")
        tenant, key = words
        hashed = _HASHED.fullmatch(key)
        if hashed is None and len(key) < SHORTEST:
            raise InputError(f"{place}: the key of {tenant} has {len(key)} characters; expected at least {SHORTEST}")
        yield place, hashed[1] if hashed else _digest(key), tenant


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_open(host: str, keys: Keys) -> None:
    """Refuse to let others in without keys.

    Raises:
        UsageError: there are none, and other machines could reach the address.
    """
    if not keys and not is_loopback(host):
        raise UsageError(
            f"--host {host} can be reached from other machines, and there are no API keys; give some with --keys FILE "
            f"or in {VARIABLE}, or stay on 127.0.0.1"
        )
