"""The index of a store: which entries there are, what they are found by, and which were used last. SQLite, in WAL mode.

An index is a witness of nothing: what it says of an entry is checked again when the entry's file is read, and it can be
made again from the files. Its transactions reserve an entry's bytes before its file is written, so that several
processes on one folder stay within one budget.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = 1
BUSY_S = 5.0
TRIES = 40
CHECKPOINT_PAGES = 64
FIELDS = "tenant, digest, kind, fingerprint, nbytes, tokens, generation, rank, keys, created, used"
KINDS = (str, str, str, str, int, int, int, int, str, float, float)
"""What fields hold. Columns have no types that SQLite would insist on, and a flipped byte may change a value's."""

TABLES = """
CREATE TABLE IF NOT EXISTS entries(
  tenant TEXT NOT NULL, digest TEXT NOT NULL, kind TEXT NOT NULL, fingerprint TEXT NOT NULL, nbytes INTEGER NOT NULL,
  tokens INTEGER NOT NULL, generation INTEGER NOT NULL, rank INTEGER NOT NULL, keys TEXT NOT NULL,
  created REAL NOT NULL, used REAL NOT NULL, ready INTEGER NOT NULL, PRIMARY KEY (tenant, digest)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS names(
  key TEXT NOT NULL, tenant TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (key, tenant, digest)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ages ON entries(used);
"""
BEST = "generation DESC, rank DESC, used DESC"


@dataclass(frozen=True)
class Entry:
    """What an index knows of a file.

    Args:
        tenant: whose it is.
        digest: of its bytes.
        kind: what it holds.
        fingerprint: of the model, code and machine that made it.
        nbytes: its size.
        tokens: how many tokens' KV it holds.
        generation, rank: among entries of one key, the one of the latest generation and there of the highest rank
            holds; see ``DiskStore.put``.
        keys: what it is found by.
        created, used: when; seconds since 1970.
    """

    tenant: str
    digest: str
    kind: str
    fingerprint: str
    nbytes: int
    tokens: int
    generation: int = 0
    rank: int = 0
    keys: tuple[str, ...] = ()
    created: float = 0.0
    used: float = 0.0


@dataclass(frozen=True)
class Total:
    """Entries of one tenant and kind, and their bytes and tokens."""

    tenant: str
    kind: str
    entries: int
    nbytes: int
    tokens: int


class Index:
    """One connection to an index. Used by one thread at a time. Every method may raise ``sqlite3.Error``.

    Args:
        path: its file; ``None`` for one in memory that dies with this object.
    """

    def __init__(self, path: Path | None) -> None:
        self._db = sqlite3.connect(path or ":memory:", timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
        except sqlite3.Error:
            self._db.close()
            raise

    def _prepare(self) -> None:
        for left in reversed(range(TRIES)):  # becoming a WAL file is refused, not queued, while others look at it
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if not left or "locked" not in str(error):
                    raise
                time.sleep(BUSY_S / TRIES)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        self._db.execute("PRAGMA journal_size_limit=0")
        if self._db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("the index is damaged")
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found not in (0, VERSION):
            raise sqlite3.DatabaseError(f"the index has version {found}, expected {VERSION}")
        with self._writing():
            for statement in TABLES.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version={VERSION}")
        for _ in self.all():  # a flipped byte inside a value is nothing that SQLite would see
            pass

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def find(self, kind: str, tenant: str, fingerprint: str, key: str, most: int) -> list[Entry]:
        """Entries of a key, the best first."""
        rows = self._db.execute(
            f"SELECT {FIELDS} FROM names JOIN entries USING (tenant, digest) WHERE key = ? AND tenant = ? AND kind = ?"  # noqa: S608  # constants
            f" AND fingerprint = ? AND ready ORDER BY {BEST} LIMIT ?",
            (key, tenant, kind, fingerprint, most),
        )
        return [_entry(row) for row in rows]

    def reserve(self, entry: Entry, limit: int, oldest: float) -> tuple[bool, list[Entry]]:
        """Enter an entry whose file is about to be written, and take out what makes room for it.

        Args:
            entry: the entry.
            limit: bytes that all entries may have together.
            oldest: entries that nobody used since then go first.

        Returns:
            Whether it has room, and entries whose files are to be removed.
        """
        if entry.nbytes > limit:
            return False, []
        with self._writing():
            gone = self._make_room(limit - entry.nbytes, oldest)
            self._put(entry, ready=False)
        return True, gone

    def trim(self, limit: int, oldest: float) -> list[Entry]:
        """Take out what is too old, and what makes the rest fit; their files are to be removed."""
        with self._writing():
            return self._make_room(limit, oldest)

    def put(self, entry: Entry) -> None:
        """Enter an entry whose file is there."""
        with self._writing():
            self._put(entry, ready=True)

    def drop(self, entries: Iterable[tuple[str, str]]) -> None:
        """Take out entries, by tenant and digest."""
        with self._writing():
            for pair in entries:
                self._drop(pair)

    def touch(self, used: Sequence[tuple[str, str]], now: float) -> None:
        """Note that entries, by tenant and digest, were used."""
        with self._writing():
            self._db.executemany(
                "UPDATE entries SET used = ? WHERE tenant = ? AND digest = ?", [(now, *pair) for pair in used]
            )

    def all(self) -> Iterator[tuple[Entry, bool]]:
        """All entries, and whether their files were written."""
        for row in self._db.execute(f"SELECT {FIELDS}, ready FROM entries").fetchall():  # noqa: S608  # constants
            yield _entry(row[:-1]), bool(row[-1])

    def totals(self) -> list[Total]:
        """Sums by tenant and kind."""
        rows = self._db.execute(
            "SELECT tenant, kind, COUNT(*), SUM(nbytes), SUM(tokens) FROM entries WHERE ready "
            "GROUP BY tenant, kind ORDER BY tenant, kind"
        )
        return [Total(*row) for row in rows]

    def compact(self) -> None:
        """Give space that is free inside the file back."""
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("VACUUM")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, alone among all processes."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _make_room(self, limit: int, oldest: float) -> list[Entry]:
        """Take out what is older than ``oldest``, then what was used longest ago, and what links have learned last."""
        (total,) = self._db.execute("SELECT COALESCE(SUM(nbytes), 0) FROM entries").fetchone()
        gone = []
        order = "ORDER BY used >= ?, kind = 'link', used"
        for row in self._db.execute(f"SELECT {FIELDS} FROM entries {order}", (oldest,)).fetchall():  # noqa: S608  # constants
            entry = _entry(row)
            if total <= limit and entry.used >= oldest:
                break
            self._drop((entry.tenant, entry.digest))
            total -= entry.nbytes
            gone.append(entry)
        return gone

    def _put(self, entry: Entry, *, ready: bool) -> None:
        self._db.execute(
            f"INSERT OR REPLACE INTO entries({FIELDS}, ready) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",  # noqa: S608  # constants
            (
                entry.tenant,
                entry.digest,
                entry.kind,
                entry.fingerprint,
                entry.nbytes,
                entry.tokens,
                entry.generation,
                entry.rank,
                json.dumps(entry.keys),
                entry.created,
                entry.used,
                ready,
            ),
        )
        named = [(key, entry.tenant, entry.digest) for key in entry.keys]
        self._db.executemany("INSERT OR REPLACE INTO names(key, tenant, digest) VALUES (?,?,?)", named)

    def _drop(self, pair: tuple[str, str]) -> None:
        for row in self._db.execute("SELECT keys FROM entries WHERE tenant = ? AND digest = ?", pair).fetchall():
            named = [(key, *pair) for key in _keys(row[0])]
            self._db.executemany("DELETE FROM names WHERE key = ? AND tenant = ? AND digest = ?", named)
        self._db.execute("DELETE FROM entries WHERE tenant = ? AND digest = ?", pair)


def _entry(row: Sequence[Any]) -> Entry:
    if any(not isinstance(value, kind) for value, kind in zip(row, KINDS, strict=True)):
        raise sqlite3.DatabaseError("the index is damaged: a field is of another kind")
    tenant, digest, kind, fingerprint, nbytes, tokens, generation, rank, keys, created, used = row
    return Entry(tenant, digest, kind, fingerprint, nbytes, tokens, generation, rank, _keys(keys), created, used)


def _keys(text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"the index is damaged: {error}") from error
    if not isinstance(names, list) or any(not isinstance(name, str) for name in names):
        raise sqlite3.DatabaseError("the index is damaged: an entry's keys are no list of texts")
    return tuple(names)
