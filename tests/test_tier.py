"""A persistent store's folder: what is damaged, foreign, gone or too much is a miss, and never a wrong answer."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmesh.errors import InputError
from agentmesh.sharing.budget import Worth
from agentmesh.sharing.tier import disk as module
from agentmesh.sharing.tier.counts import Counts
from agentmesh.sharing.tier.disk import DiskStore, Put
from agentmesh.sharing.tier.folder import digest_of
from agentmesh.sharing.tier.index import Entry
from agentmesh.sharing.tier.records import Record
from agentmesh.sharing.tier.writer import Writer

MIB = 2**20
ROOT = Path(__file__).parent.parent


def record(name: str, size: int = 8, tenant: str = "", **extra: Any) -> Record:
    """A record whose tensor follows from its name, so that a wrong one would show."""
    seed = int(digest_of(f"{tenant} {name}".encode())[:8], 16)
    data = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    facts = {"kind": "reading", "fingerprint": "model", "keys": (name,), "about": {"name": name}, "tokens": 1}
    return Record(tenant=tenant, tensors={"data": data}, **{**facts, **extra})


def found(store: DiskStore, name: str, tenant: str = "", kind: str = "reading") -> Record | None:
    """What a store gives for a name: never anything but what was kept under it."""
    for entry in store.find(kind, tenant, "model", name):
        got = store.get(entry)
        if got is not None and got.about["name"] == name:
            assert torch.equal(got.tensors["data"], record(name, len(got.tensors["data"]), tenant).tensors["data"])
            return got
    return None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    """An empty store."""
    made = DiskStore(tmp_path / "kv", 64 * MIB)
    yield made
    made.close()


def file_of(store: DiskStore, name: str) -> Path:
    (entry,) = store.find("reading", "", "model", name)
    return store.folder.path("", entry.digest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_kept_comes_back_bit_for_bit(store: DiskStore, dtype: torch.dtype) -> None:
    keys = torch.randn(2, 2, 5, 4).to(dtype)
    sent = Record("prefix", "t", "model", ("k",), {"keys": keys[:, :, 1:4], "same": keys[:, :, 1:4]}, {"cuts": [3]}, 3)

    assert store.put(sent) is Put.STORED
    assert store.put(sent) is Put.THERE
    (entry,) = store.find("prefix", "t", "model", "k")
    got = store.get(entry)

    assert got is not None
    assert torch.equal(got.tensors["keys"].view(torch.uint8), keys[:, :, 1:4].contiguous().view(torch.uint8))
    assert (got.about, got.tokens, got.tenant) == ({"cuts": [3]}, 3, "t")
    for other in (("link", "t", "model", "k"), ("prefix", "u", "model", "k"), ("prefix", "t", "other", "k")):
        assert store.find(*other) == []


def test_a_flip_of_any_byte_is_a_miss_and_the_file_is_set_aside(store: DiskStore) -> None:
    for size in (0, 3, 64):
        sent = record(f"r{size}", size)
        store.put(sent)
        path = file_of(store, f"r{size}")
        whole, entry = path.read_bytes(), store.find("reading", "", "model", f"r{size}")[0]
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
            assert store.get(entry) is None, place
            assert not path.exists()
        assert found(store, f"r{size}") is None
        assert store.put(sent) is Put.STORED
        assert found(store, f"r{size}") is not None


def test_a_flip_is_found_too_when_the_index_is_made_again(store: DiskStore, tmp_path: Path) -> None:
    store.put(record("r"))
    path = file_of(store, "r")
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        store.folder.index.unlink(missing_ok=True)
        again = DiskStore(tmp_path / "kv", 64 * MIB)
        assert found(again, "r") is None, place
        again.close()
    path.write_bytes(whole)
    again = DiskStore(tmp_path / "kv", 64 * MIB)
    assert found(again, "r") is not None
    again.close()


def test_a_file_that_was_cut_or_has_grown_is_a_miss(store: DiskStore) -> None:
    store.put(record("r"))
    path = file_of(store, "r")
    whole, (entry,) = path.read_bytes(), store.find("reading", "", "model", "r")
    for data in [whole[:size] for size in range(0, len(whole), 11)] + [whole + b"x", b"", b"\0" * len(whole)]:
        path.write_bytes(data)
        assert store.get(entry) is None


def test_foreign_files_are_set_aside_and_disturb_nothing(store: DiskStore, tmp_path: Path) -> None:
    store.put(record("a"))
    store.put(record("b", tenant="t"))
    place = file_of(store, "a").parent
    other = store.folder.path("t", store.find("reading", "t", "model", "b")[0].digest)
    shutil.copy(other, place / other.name)  # another tenant's
    shutil.copy(file_of(store, "a"), place / f"{'0' * 64}.safetensors")  # under another name
    (place / "notes.txt").write_text("mine")
    (place / "folder.safetensors").mkdir()
    (place.parent / "lost").mkdir()
    (place.parent / "stray").write_text("x")

    again = DiskStore(tmp_path / "kv", 64 * MIB)
    names = {entry.digest for entry in again.find("reading", "", "model", "b")}
    assert names == set()
    assert again.folder.set_aside_count() == 5
    checked = again.verify()
    assert (checked.whole, checked.damaged) == (2, 1), "the one under another name shows when it is read"
    assert found(again, "a") is not None
    assert found(again, "b", "t") is not None
    again.collect()
    assert again.folder.set_aside_count() == 0
    again.close()


def test_a_flip_of_any_byte_of_the_index_costs_misses_at_most(store: DiskStore, tmp_path: Path) -> None:
    for number in range(4):
        store.put(record(f"r{number}", tenant="t" * (number % 2)))
    store._index.compact()
    store.close()
    whole = store.folder.index.read_bytes()
    keys = whole.rindex(b'["r')
    written = [at for at, byte in enumerate(whole) if byte]
    for at in [*range(keys, keys + 6), *random.Random(0).sample(written, 24)]:
        folder = tmp_path / f"flipped-{at}"
        shutil.copytree(tmp_path / "kv", folder)
        (folder / "index.sqlite").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])

        again = DiskStore(folder, 64 * MIB, ttl=1e9)
        for number in range(4):
            found(again, f"r{number}", "t" * (number % 2))
        again.put(record("more"))
        checked = again.verify()
        assert checked.damaged <= 1, f"byte {at}: nothing but the entry that was hit may be given up"
        again.collect()
        again.close()
        reopened = DiskStore(folder, 64 * MIB)
        assert sum(total.entries for total in reopened.totals()) >= checked.whole
        reopened.close()


def header_of(**facts: object) -> bytes:
    """The beginning of a safetensors file that says such things of itself."""
    named = {"layout": 1, "kind": "reading", "tenant": "", "fingerprint": "model", "keys": ["k"], "about": {}}
    text = json.dumps({**named, "tokens": 1, "generation": 0, "rank": 0, **facts})
    header = json.dumps({"__metadata__": {"agentmesh": text}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        header_of(tokens=float("inf")),
        header_of(rank=10**30),
        header_of(generation=-(10**30)),
        header_of(keys=["\ud800"]),
        header_of(keys=7),
        header_of(tokens=[]),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_files_that_say_impossible_things_of_themselves_are_set_aside(
    store: DiskStore, tmp_path: Path, content: bytes
) -> None:
    store.put(record("a"))
    (file_of(store, "a").parent / f"{digest_of(content)}.safetensors").write_bytes(content)

    again = DiskStore(tmp_path / "kv", 64 * MIB)
    assert again.folder.set_aside_count() == 1
    assert found(again, "a") is not None
    again.close()


@pytest.mark.parametrize("harm", ["gone", "empty", "garbage", "cut", "version", "a folder"])
def test_an_index_that_is_lost_or_damaged_is_made_again(store: DiskStore, tmp_path: Path, harm: str) -> None:
    for number in range(20):
        store.put(record(f"r{number}", tenant="t" * (number % 2)))
    store.close()
    index = store.folder.index
    whole = index.read_bytes()
    for path in index.parent.glob("index.sqlite*"):
        path.unlink()
    if harm == "a folder":
        index.mkdir()
    elif harm == "version":
        index.write_bytes(whole)
        with sqlite3.connect(index) as other:
            other.execute("PRAGMA user_version=99")
        other.close()
    elif harm != "gone":
        index.write_bytes({"empty": b"", "garbage": b"no index" * 999, "cut": whole[: len(whole) // 2]}[harm])

    again = DiskStore(tmp_path / "kv", 64 * MIB)
    assert [found(again, f"r{number}", "t" * (number % 2)) is not None for number in range(20)] == [True] * 20
    assert again.verify().damaged == 0
    again.close()


def test_an_index_that_breaks_while_it_is_used_costs_misses(store: DiskStore) -> None:
    store.put(record("r"))
    store._index._db.execute("DROP TABLE entries")

    assert store.find("reading", "", "model", "r") == []
    assert store.put(record("s")) is Put.FAILED
    assert store.totals() == []
    assert "entries" in store.counts.trouble


def test_the_folder_stays_within_its_budget_and_what_was_used_last_stays(tmp_path: Path) -> None:
    budget, draw = 4 * MIB, random.Random(1)
    store = DiskStore(tmp_path / "kv", budget)
    size = 25_000  # 100 kB each
    store.put(record("link", size, kind="link"))
    for number in range(60):
        store.put(record(f"r{number}", size + draw.randint(0, 5000)))
        assert found(store, "r0") is not None
        store.touch([("", store.find("reading", "", "model", "r0")[0].digest)])
        assert folder_bytes(tmp_path) <= budget
    assert found(store, "r59") is not None
    assert found(store, "r1") is None
    assert found(store, "link", kind="link") is not None, "what links have learned goes last"
    assert store.put(record("huge", 2 * budget)) is Put.REFUSED
    assert found(store, "r59") is not None, "nothing had to go for what never fits"
    store.close()

    smaller = DiskStore(tmp_path / "kv", budget // 2)
    assert folder_bytes(tmp_path) <= budget // 2
    smaller.close()


def folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_damaged_files_count_in_the_budget_and_go_first(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "kv", 4 * MIB)
    for number in range(10):
        store.put(record(f"r{number}", 50_000))
        path = file_of(store, f"r{number}")
        path.write_bytes(b"x" * 400_000)
        assert found(store, f"r{number}") is None
        store.put(record(f"s{number}", 50_000))
    assert folder_bytes(tmp_path) <= 4 * MIB
    assert sum(found(store, f"s{number}") is not None for number in range(10)) == 10
    store.close()


def test_what_nobody_used_for_its_time_to_live_is_gone(tmp_path: Path) -> None:
    now = [1000.0]
    store = DiskStore(tmp_path / "kv", 64 * MIB, 100.0, clock=lambda: now[0])
    store.put(record("a"))
    store.put(record("b"))
    now[0] = 1090.0
    store.touch([("", store.find("reading", "", "model", "b")[0].digest)])
    now[0] = 1150.0
    assert (found(store, "a"), found(store, "b") is not None) == (None, True)
    store.put(record("c"))
    assert len(list((tmp_path / "kv" / "tenants" / "default").iterdir())) == 2
    now[0] = 2000.0
    DiskStore(tmp_path / "kv", 64 * MIB, 100.0, clock=lambda: now[0]).close()
    assert not list((tmp_path / "kv" / "tenants" / "default").iterdir())
    store.close()


def test_a_newer_generation_holds_and_nothing_older_brings_itself_back(store: DiskStore) -> None:
    def link(rank: int, generation: int) -> Put:
        return store.put(record("link", 4 + rank, kind="link", rank=rank, generation=generation), replaces=True)

    assert [link(5, 0), link(9, 0)] == [Put.STORED, Put.STORED]
    assert link(7, 0) is Put.REFUSED, "another process has seen more"
    assert link(0, 1) is Put.STORED, "the breaker opened"
    assert link(50, 0) is Put.REFUSED, "a process that has not heard of it"
    assert [entry.generation for entry in store.find("link", "", "model", "link")] == [1]
    assert len(list((store.folder.root / "tenants" / "default").iterdir())) == 1


def test_where_keys_and_digests_collide_nothing_wrong_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "digest_of", lambda _data: "0" * 64)
    monkeypatch.setattr("agentmesh.sharing.tier.folder.digest_of", lambda _data: "0" * 64)
    store = DiskStore(tmp_path / "kv", 64 * MIB)
    for tenant in ("", "t"):
        store.put(record("a", tenant=tenant, keys=("same",)))
        store.put(record("b", tenant=tenant, keys=("same",)))
    for tenant in ("", "t"):
        names = [store.get(entry) for entry in store.find("reading", tenant, "model", "same")]
        assert [(got.about["name"], got.tenant) for got in names if got is not None] == [("a", tenant)]
    store.close()


def test_tenants_lie_in_folders_of_their_own(store: DiskStore) -> None:
    store.put(record("a", tenant="one"))
    store.put(record("a", tenant="two"))

    names = {path.name for path in (store.folder.root / "tenants").iterdir()}
    assert names == {"tenant-one", "tenant-two"}
    assert store.clear("one") == 1
    assert found(store, "a", "one") is None
    assert found(store, "a", "two") is not None
    shutil.rmtree(store.folder.root / "tenants" / "tenant-two")
    assert found(store, "a", "two") is None
    assert store.put(record("a", tenant="two")) is Put.STORED


def test_what_a_killed_process_was_writing_is_swept_away(store: DiskStore, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (store.folder.partial / f"{int(done.stdout)}-{'0' * 64}").write_bytes(b"x" * 1000)
    (store.folder.partial / f"{os.getpid()}-{'1' * 64}").write_bytes(b"mine")

    DiskStore(tmp_path / "kv", 64 * MIB).close()

    assert [path.name[:8] for path in store.folder.partial.iterdir()] == [f"{os.getpid()}-{'1' * 64}"[:8]]


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("x")

    with pytest.raises(InputError, match="found a file, expected a folder"):
        DiskStore(tmp_path / "kv", 64 * MIB)
    with pytest.raises(InputError, match=r"cannot make the folder \(Not a directory\); name another place"):
        DiskStore(tmp_path / "kv" / "below", 64 * MIB)


CHILD = """
import resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_tier import MIB, found, record
from agentmesh.sharing.tier.disk import DiskStore
{before}
store = DiskStore(Path({path!r}), 64 * MIB)
print(found(store, "old") is not None, store.put(record("new", 500_000)), found(store, "new") is not None)
print(store.counts.trouble)
"""


def in_child(path: Path, before: str) -> list[str]:
    """What a process with limits of its own finds in a folder: the old entry, what became of a new one, and why."""
    code = CHILD.format(tests=str(ROOT / "tests"), path=str(path), before=before)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_disk_that_is_full_keeps_what_is_there(store: DiskStore, tmp_path: Path) -> None:
    store.put(record("old"))

    first, trouble = in_child(tmp_path / "kv", "resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))")

    assert first == "True failed False"
    assert "File too large" in trouble
    assert not list(store.folder.partial.iterdir())
    assert store.put(record("new", 500_000)) is Put.STORED


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_real_small_disk_that_is_full(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=False).returncode:
        pytest.skip("no mounts here")
    try:
        full = DiskStore(place / "kv", 64 * MIB)
        assert full.put(record("old")) is Put.STORED
        assert full.put(record("new", 500_000)) is Put.FAILED
        assert "space" in full.counts.trouble or "full" in full.counts.trouble
        for number in range(300):
            full.put(record(f"r{number}", 5000))
        assert full.counts.failed > 1
        assert found(full, "old") is not None
        assert full.verify().damaged == 0
        full.close()
        again = DiskStore(place / "kv", 64 * MIB)
        assert found(again, "old") is not None
        assert again.verify().damaged == 0
        again.close()
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_folder_that_is_read_only_is_read(store: DiskStore, tmp_path: Path) -> None:
    store.put(record("old"))
    store.put(record("bad"))
    file_of(store, "bad").write_bytes(b"x")
    (store.folder.root / "tenants" / "stray").touch()
    store.close()
    for path in [*tmp_path.rglob("*"), tmp_path]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in takewhile(lambda one: one != Path(tempfile.gettempdir()), tmp_path.parents):
        path.chmod(0o755)
    drop = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)" if os.geteuid() == 0 else ""
    try:
        first, trouble = in_child(tmp_path / "kv", drop)
    finally:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            path.chmod(0o755)

    assert first == "True failed False"
    assert "nothing can be written to" in trouble


def test_a_writer_survives_work_for_which_there_is_no_memory(tmp_path: Path) -> None:
    counts = Counts()
    writer = Writer(DiskStore(tmp_path / "kv", 64 * MIB, counts=counts), 1000)

    def greedy(_store: DiskStore) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    writer.submit(greedy, 100)
    writer.submit(lambda store: store.put(record("r")), 100)

    assert writer.drain(30)
    writer.close(30)
    assert (counts.failed, counts.stored) == (1, 1)
    assert "can't allocate" in counts.line


def test_a_writer_takes_what_fits_its_queue_and_counts_the_rest(tmp_path: Path) -> None:
    counts = Counts()
    writer = Writer(DiskStore(tmp_path / "kv", 64 * MIB, counts=counts), 1000)
    assert writer.takes(1000)
    assert not writer.takes(1001)
    assert counts.dropped == 1

    for number in range(10):
        writer.submit(lambda store, n=number: store.put(record(f"r{n}")), 100)
    assert writer.drain(30)
    assert (counts.stored, writer.nbytes) == (10, 0)
    writer.close(30)
    assert not writer.takes(1)


def test_a_writer_gives_up_what_waits_longest_when_memory_is_short(tmp_path: Path) -> None:
    import threading

    counts, go, begun = Counts(), threading.Event(), threading.Event()
    writer = Writer(DiskStore(tmp_path / "kv", 64 * MIB, counts=counts), 1000)

    def hold(_store: DiskStore) -> None:
        begun.set()
        go.wait(30)

    writer.submit(hold, 1)
    assert begun.wait(30)
    for number in range(3):
        writer.submit(lambda store, n=number: store.put(record(f"r{n}")), 100)
    assert writer.nbytes == 301
    assert writer.evict(150, Worth.LATER) == 0
    assert writer.evict(150, Worth.IDLE) == 200
    go.set()
    writer.close(30)
    assert (counts.stored, counts.dropped) == (1, 2)


def test_a_record_that_says_it_is_of_another_kind_is_set_aside(store: DiskStore) -> None:
    store.put(record("r"))
    (entry,) = store.find("reading", "", "model", "r")

    assert store.get(Entry("", entry.digest, "link", "model", entry.nbytes, 0)) is None
    assert store.folder.set_aside_count() == 1
