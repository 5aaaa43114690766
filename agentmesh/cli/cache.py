"""``agentmesh cache``: look after a folder that keeps KV beyond a run."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from agentmesh.blueprint import Blueprint, draft
from agentmesh.cli.options import Format, FormatOption, Libraries, Sets, StoreOption
from agentmesh.config.base import parse_bytes, parse_seconds
from agentmesh.config.load import load_mesh
from agentmesh.config.mesh import Dtype, ModelSpec
from agentmesh.config.presets import CommunicatorSpec, StoreSpec
from agentmesh.display import fetching
from agentmesh.errors import InputError, NotFoundError, RecordError, UnsupportedModelError
from agentmesh.library import cache_root
from agentmesh.turns import tenant_name

if TYPE_CHECKING:
    from agentmesh.prompt import Content
    from agentmesh.sharing.tier.disk import DiskStore

app = typer.Typer(help="Look after the folder that keeps KV and what was learned beyond a run.", no_args_is_help=True)

WITHOUT_LIMIT = 2**62
TenantOption = Annotated[str | None, typer.Option(help="Whose entries; tenants never see each other's.")]


def default_store() -> Path:
    """Where these commands look if no folder is named."""
    return cache_root() / "kv"


@app.command("stats")
def stats(store: StoreOption = None, format: FormatOption = Format.TEXT) -> None:
    """Say what a folder holds, by tenant and kind: prefixes, readings and passages, and what links have learned."""
    with _opened(store) as disk:
        rows: list[dict[str, Any]] = [
            {"tenant": t.tenant, "kind": t.kind, "entries": t.entries, "tokens": t.tokens, "bytes": t.nbytes}
            for t in disk.totals()
        ]
        found: dict[str, Any] = {
            "store": str(disk.folder.root),
            "bytes": disk.used(),
            "set_aside": disk.folder.set_aside_count(),
            "entries": rows,
        }
    if format is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(
        "tenant",
        "kind",
        *(Column(name, justify="right") for name in ("entries", "tokens", "MiB")),
        title=found["store"],
    )
    for row in rows:
        table.add_row(
            row["tenant"] or "(none)", row["kind"], f"{row['entries']:,}", f"{row['tokens']:,}", _mib(row["bytes"])
        )
    Console().print(table if rows else f"{found['store']} is empty")
    typer.echo(f"{_mib(found['bytes'])} MiB in all; {found['set_aside']} damaged or foreign files are set aside")


@app.command("verify")
def verify(store: StoreOption = None, format: FormatOption = Format.TEXT) -> None:
    """Read every file and compare it with its checksum; what is damaged is set aside. Exits with 1 if anything was."""
    with _opened(store) as disk, _bar("verifying") as tick:
        checked = disk.verify(tick)
        damaged = disk.counts.damaged
    if format is Format.JSON:
        typer.echo(json.dumps({"whole": checked.whole, "damaged": damaged}, indent=2))
    else:
        typer.echo(f"{checked.whole} files are whole, {damaged} were damaged or foreign and are set aside")
    if damaged:
        raise typer.Exit(1)


@app.command("gc")
def gc(
    store: StoreOption = None,
    budget: Annotated[str | None, typer.Option(help="What the folder may take up, such as 2GiB.")] = None,
    ttl: Annotated[str | None, typer.Option(help="Remove what nobody used for so long, such as 7d.")] = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Remove what was set aside or left over by killed processes, what is too old, and what is beyond a budget."""
    with _opened(store, _limit(budget), _limit_seconds(ttl), changes=True) as disk:
        freed = disk.collect()
        found = {"evicted": disk.counts.evicted, "freed_bytes": freed, "bytes": disk.used()}
    if format is Format.JSON:
        typer.echo(json.dumps(found, indent=2))
        return
    typer.echo(f"removed {found['evicted']} entries and what was left over; {_mib(found['bytes'])} MiB are kept")


@app.command("clear")
def clear(
    store: StoreOption = None,
    tenant: TenantOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    format: FormatOption = Format.TEXT,
) -> None:
    """Remove all entries, or those of one tenant."""
    whose = "of all tenants" if tenant is None else f"of tenant {tenant_name(tenant)!r}"
    with _opened(store, changes=True) as disk:
        if not yes:
            typer.confirm(f"Remove all entries {whose} from {disk.folder.root}?", abort=True)
        removed = disk.clear(tenant)
    typer.echo(json.dumps({"removed": removed}) if format is Format.JSON else f"removed {removed} entries {whose}")


@app.command("warm")
def warm(
    docs: Annotated[Path, typer.Argument(help="A folder of .txt or .md files, or a JSONL file with text and title.")],
    store: StoreOption = None,
    mesh: Annotated[
        str | None, typer.Option(help="A mesh that will read them: its model, least length and store are taken.")
    ] = None,
    model: Annotated[str, typer.Option(help="The model, where no mesh is named.")] = "smollm2-135m",
    dtype: Annotated[Dtype, typer.Option(help="Its number format, where no mesh is named.")] = Dtype.FLOAT32,
    tenant: TenantOption = None,
    set: Sets = None,
    library: Libraries = None,
    format: FormatOption = Format.TEXT,
) -> None:
    """Compute the KV of a corpus' passages ahead, so that the first run that retrieves one shares it.

    Example: agentmesh cache warm handbook/ --mesh rag-chain

    Run with the same --store, or name it in the mesh: communicator: {preset:
    linear, store: FOLDER}. What is there already is not computed again.
    """
    from agentmesh.agents.retriever import read_passages  # noqa: PLC0415  # bm25s is slow to import

    target = _Target(
        ModelSpec(name=model, dtype=dtype), CommunicatorSpec().min_tokens, StoreSpec(path=str(default_store()))
    )
    if mesh is not None:
        target = _Target.of(draft(load_mesh(mesh, overrides=set or (), libraries=library or ())))
    if store is not None:
        target = replace(target, store=target.store.model_copy(update={"path": str(store)}))
    passages, place = read_passages(docs), target.store.path
    found = _warm(passages, target, tenant_name(target.store.tenant if tenant is None else tenant))
    if format is Format.JSON:
        typer.echo(json.dumps({"store": str(place), **found}, indent=2))
        return
    typer.echo(
        f"{len(passages)} passages: {found['computed']} computed, {found['there']} there already, {found['skipped']} "
        f"too short or too long; {_mib(found['written_bytes'])} MiB written to {place}"
    )


@dataclass(frozen=True)
class _Target:
    """Who will read passages: the model, the shortest passage that is shared, and the store."""

    model: ModelSpec
    min_tokens: int
    store: StoreSpec

    @staticmethod
    def of(blueprint: Blueprint) -> _Target:
        """A mesh's, with the store's path as it is from here.

        Raises:
            InputError: its model is remote.
        """
        sharing = blueprint.communicator
        place = default_store() if sharing.store is None else blueprint.folder / Path(sharing.store.path).expanduser()
        own = sharing.store or StoreSpec(path=str(place))
        return _Target(blueprint.local_model(), sharing.min_tokens, own.model_copy(update={"path": str(place)}))


def _warm(passages: list[Content], target: _Target, tenant: str) -> dict[str, int]:
    """Compute and keep passages one by one.

    Raises:
        UnsupportedModelError: the model's KV cannot be moved.
        RecordError: passages could not be written.
    """
    from agentmesh.local import LocalBackend  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    rotate, place = CommunicatorSpec(preset="rotate", min_tokens=target.min_tokens), target.store.path
    with fetching(Console(stderr=True), quiet=False) as progress:
        backend = LocalBackend.open(target.model, rotate, progress)
    try:
        facts = backend.describe()
        if facts["reuse"] != "realign":
            raise UnsupportedModelError(f"{facts['name']} cannot place passages: {facts['reuse_limit']}")
        backend.keep_in(Path(place), target.store, {}, reads=True)
        kept = backend.kept
        assert kept is not None, "a model whose KV can be moved has arenas"
        new = 0
        with _bar("passages") as tick:
            for number, passage in enumerate(passages, 1):
                new += asyncio.run(backend.ingest([passage], tenant))
                kept.writer.drain()
                tick(number, len(passages))
    finally:
        backend.close()
    counts = kept.store.counts
    if counts.failed or counts.refused or counts.dropped:
        lost = counts.failed + counts.refused + counts.dropped
        why = counts.trouble or "they do not fit the store's budget"
        raise RecordError(f"{lost} of {len(passages)} passages could not be written to {place}: {why}")
    return {
        "computed": counts.stored,
        "there": counts.hits,
        "skipped": len(passages) - new,
        "written_bytes": counts.written_bytes,
    }


@contextmanager
def _opened(
    store: Path | None, budget: int = WITHOUT_LIMIT, ttl: float | None = None, *, changes: bool = False
) -> Iterator[DiskStore]:
    """A folder that is there already.

    Raises:
        NotFoundError: it is not.
        RecordError: it is to be changed, and cannot.
    """
    from agentmesh.sharing.tier.disk import DiskStore  # noqa: PLC0415  # keeps `agentmesh --help` free of torch

    path = store or default_store()
    if not path.exists():
        raise NotFoundError(
            f"no store at {path}; name one with --store, or make one: `agentmesh run MESH --store {path}` or "
            f"`agentmesh cache warm DOCS --store {path}`"
        )
    disk = DiskStore(path, budget, ttl)
    try:
        if changes and disk.limits:
            raise RecordError(f"{disk.limits}; make it writable, or name another one with --store")
        yield disk
    finally:
        disk.close()


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _limit(text: str | None) -> int:
    try:
        return WITHOUT_LIMIT if text is None else parse_bytes(text)
    except ValueError as error:
        raise InputError(f"--budget: {error}") from error


def _limit_seconds(text: str | None) -> float | None:
    try:
        return None if text is None else parse_seconds(text)
    except ValueError as error:
        raise InputError(f"--ttl: {error}") from error


def _mib(nbytes: Any) -> str:
    return f"{nbytes / 2**20:,.1f}"
