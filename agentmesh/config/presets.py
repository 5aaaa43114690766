"""Communicator presets as data: what each places, how it realigns, what it computes (docs/method.md, 1).

A preset is made of these choices, and a mesh file may change any of them:

| choice                 | variants                                                                            |
|------------------------|-------------------------------------------------------------------------------------|
| ``share``              | nothing, exact prefixes, or prefixes and slots                                       |
| ``realigner``          | none (position only), linear (learned), anchors (the paper's, with its own gate)     |
| ``recompute``          | the first tokens of each placed block, and a share of its tokens that is picked      |
| ``blocks``             | whether several segments that were read in one go are placed in one piece            |
| ``repeats``            | whether copied words are placed from where their writer had read them                |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import Self

from agentmesh.config.base import TENANT, Bytes, Choice, Frozen, Integer, Number, Seconds, Shorthand
from agentmesh.errors import listing

MIB = 2**20

Count = Annotated[Integer, Field(ge=0)]
Part = Annotated[Number, Field(ge=0, le=1)]


class Share(Choice):
    """What a preset may take from a store."""

    NOTHING = "nothing"
    PREFIX = "prefix"
    SLOTS = "slots"


class RealignerKind(Choice):
    """The table of realigners: what is added to placed KV besides its new position.

    A row is a name in mesh files, what makes one that has learned nothing, and what it can do:

    Args:
        made_by: ``module:name``, called with the model's ``KVShape``; imported when a model is there, never to read a
            file. Nothing for ``anchors``, which is a preset of its own: it places fixed text, too.
        learns: whether it learns from observations what `agentmesh calibrate` can save.
        ranks: whether it can say which tokens of a block to compute (``by: leverage``, ``by: offset``).
    """

    made_by: str
    learns: bool
    ranks: bool

    def __new__(cls, name: str, made_by: str, learns: bool = False, ranks: bool = False) -> Self:
        """A word with what its row says."""
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.made_by, kind.learns, kind.ranks = made_by, learns, ranks
        return kind

    NONE = "none", "agentmesh.sharing.realigner:NoOffset.empty"
    LINEAR = "linear", "agentmesh.sharing.linear:Linear.empty", True, True
    ANCHORS = "anchors", ""


class Picking(Choice):
    """How the share ``ratio`` of a block's tokens is picked."""

    DEVIATION = "deviation"
    """By how far their keys are off in the second layer (CacheBlend)."""

    ATTENTION = "attention"
    """By the attention that the text behind them pays them (docs/method.md, 5)."""

    LEVERAGE = "leverage"
    """By how unlike everything they are that the realigner has seen (docs/method.md, 4); takes no look."""

    OFFSET = "offset"
    """By how far the realigner would move them: what moves far is placed worst; takes no look."""


BY_REALIGNER = (Picking.LEVERAGE, Picking.OFFSET)
"""What a realigner that ``ranks`` tokens knows without a look at the cache."""


class Recompute(Frozen):
    """Which tokens of a placed block are computed all the same.

    ``first`` tokens of each block, at most a share ``most_first`` of it; its last ``breaks`` tokens with a line break,
    at most a share ``most_breaks`` of it, whose offsets are the largest and least predictable (docs/figures.md); and
    ``ratio`` of the others, at most ``most_picked`` times the number of blocks, picked ``by`` a look at the cache, or
    by what the realigner knows. Of passages that are known from the corpus alone it is ``documents_first`` tokens, and
    a share ``documents`` that their own later text and the prompt's words make most of (``communicator.picks``).
    ``fixed`` says whether fixed text between blocks is computed; only the ``anchors`` realigner can place it.
    """

    first: Count = 0
    breaks: Count = 0
    most_first: Part = 1.0
    most_breaks: Part = 1.0
    ratio: Part = 0.0
    most_picked: Annotated[Integer, Field(ge=1)] = 1 << 20
    by: Picking = Picking.DEVIATION
    documents: Part = 0.0
    documents_first: Count = 8
    fixed: bool = True

    def head(self, tokens: int, *, corpus: bool = False) -> int:
        """Tokens at the beginning of a block of so many that are computed, or of a passage that more is picked of."""
        first = self.documents_first if corpus and self.documents else self.first
        return min(first, int(self.most_first * tokens))

    def picked(self, tokens: int, blocks: int) -> int:
        """How many of so many placed tokens of so many blocks are picked."""
        return min(round(self.ratio * tokens), self.most_picked * blocks)

    def picked_of_passages(self, tokens: int) -> int:
        """How many of so many placed tokens of a corpus' passages are picked."""
        return round(self.documents * tokens)

    def line_breaks(self, tokens: int) -> int:
        """Line breaks at the end of a block of so many tokens that are computed at most."""
        return min(self.breaks, int(self.most_breaks * tokens))


LIMITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"most_first": ("first",), "most_breaks": ("breaks",), "most_picked": ("ratio", "by")}
)
"""Choices of ``Recompute`` that only limit others."""


class RecomputeSpec(Frozen):
    """Changes to what a preset computes of placed blocks; what is not named stays as the preset has it."""

    first: Count | None = None
    breaks: Count | None = None
    most_first: Part | None = None
    most_breaks: Part | None = None
    ratio: Part | None = None
    most_picked: Annotated[Integer, Field(ge=1)] | None = None
    by: Picking | None = None
    documents: Part | None = None
    documents_first: Count | None = None
    fixed: bool | None = None

    @classmethod
    def exactly(cls, recompute: Recompute) -> RecomputeSpec:
        """Whatever the preset has."""
        return cls.model_validate(recompute.model_dump())

    def changed(self, preset: Recompute) -> Recompute:
        """What a preset computes with these changes; what is named here is not held to the preset's limit of it."""
        named = self.model_dump(exclude_none=True)
        for limit, limited in LIMITS.items():
            if limit not in named and any(one in named for one in limited):
                named[limit] = getattr(Recompute(), limit)
        return preset.model_copy(update=named)


class AnchorSpec(Frozen):
    """Anchor pools of the ``anchors`` realigner, with the paper's names and values (arXiv 2510.12872, eq. 5)."""

    pool: Annotated[Integer, Field(ge=2)] = 20
    gamma: Annotated[Number, Field(ge=0)] = 0.3
    window: Annotated[Integer, Field(ge=1)] = 5


class StoreSpec(Frozen):
    """A folder that keeps KV and what links have learned, for later runs and other processes.

    Args:
        path: the folder; a relative one begins at the mesh file's.
        budget: bytes that the folder takes up at most.
        ttl: an entry that nobody used for so long is removed; ``null`` keeps it until the budget needs the room.
        tenant: of runs that name none.
    """

    path: Annotated[str, Field(min_length=1)]
    budget: Annotated[Bytes, Field(ge=4 * MIB)] = 8192 * MIB
    ttl: Seconds | None = 30 * 86400.0
    tenant: Annotated[str, Field(pattern=TENANT)] = ""


class CommunicatorSpec(Frozen):
    """How agents get each other's KV: a preset's name, what it may use, and changes to its choices.

    Args:
        preset: which one.
        budget: bytes that everything kept for reuse holds at most.
        min_tokens: shorter segments are computed.
        share, realigner, recompute, blocks, repeats: change the preset's choices; ``blocks`` places runs of segments
            that one earlier agent read in the same order as one block, ``repeats`` heeds words that only one of sender
            and reader has seen before (``sharing.repeats``). Of ``recompute`` only what is named changes.
        warmup: observations of a slot before it is shared; the first one has nothing that it could be compared with.
        max_kl: predicted error, in nats a token, above which a slot is computed; also the audits' limit.
        max_flips: share of audits whose most likely token may differ before a slot's breaker opens.
        audit: share of reusing calls that are checked against a dense prefill.
        max_depth: how often placed KV may be placed again (docs/method.md, 3).
        cost_gate: whether a call's slots are computed where placing them takes longer, as measured on this machine.
            Deterministic runs and evaluations never ask: there, what is fast must not decide what is answered. Nor
            is it asked where computing would be a failure (``strict``, ``deliver: kv``).
        strict: fail instead of computing what could not be shared.
        realigners: a file made by ``agentmesh calibrate``.
        store: a folder that keeps KV and what was learned beyond this process.
    """

    preset: Annotated[str, Field(min_length=1)] = "prefix"
    budget: Bytes = 1024 * MIB
    min_tokens: Annotated[Integer, Field(ge=1)] = 32
    share: Share | None = None
    realigner: RealignerKind | None = None
    recompute: RecomputeSpec | None = None
    blocks: bool | None = None
    repeats: bool | None = None
    anchors: AnchorSpec = AnchorSpec()
    warmup: Annotated[Integer, Field(ge=2)] = 5
    max_kl: Annotated[Number, Field(gt=0)] = 0.02
    max_flips: Annotated[Number, Field(gt=0, le=1)] = 0.05
    audit: Annotated[Number, Field(ge=0, le=1)] = 0.02
    max_depth: Annotated[Integer, Field(ge=0)] = 3
    cost_gate: bool = True
    strict: bool = False
    realigners: str | None = None
    store: Annotated[StoreSpec, Shorthand("path")] | None = None


class PresetSpec(Frozen):
    """A preset's choices."""

    share: Share
    realigner: RealignerKind = RealignerKind.NONE
    recompute: Recompute = Recompute()
    blocks: bool = True
    repeats: bool = False


PRESETS: Mapping[str, PresetSpec] = MappingProxyType(
    {
        "dense": PresetSpec(share=Share.NOTHING),
        "prefix": PresetSpec(share=Share.PREFIX),
        "rotate": PresetSpec(share=Share.SLOTS),
        "epic": PresetSpec(share=Share.SLOTS, recompute=Recompute(first=16)),
        "kvcomm": PresetSpec(
            share=Share.SLOTS, realigner=RealignerKind.ANCHORS, recompute=Recompute(fixed=False), blocks=False
        ),
        "linear": PresetSpec(
            share=Share.SLOTS,
            realigner=RealignerKind.LINEAR,
            recompute=Recompute(
                first=8,
                breaks=8,
                most_first=0.2,
                most_breaks=0.1,
                ratio=0.08,
                most_picked=8,
                by=Picking.OFFSET,
                documents=0.28,
            ),
            repeats=True,
        ),
        "blend": PresetSpec(share=Share.SLOTS, recompute=Recompute(ratio=0.15)),
    }
)


def choices(spec: CommunicatorSpec) -> PresetSpec:
    """A mesh's communicator with its preset's choices filled in; what the preset's realigner picks goes with it.

    Raises:
        KeyError: no preset of that name; ``blueprint.draft`` says so with a position.
        ValueError: choices that exclude each other.
    """
    preset = PRESETS[spec.preset]
    if preset.recompute.by in BY_REALIGNER and spec.realigner not in (None, preset.realigner):
        unpicked = {name: getattr(Recompute(), name) for name in ("ratio", "most_picked", "by")}
        preset = preset.model_copy(update={"recompute": preset.recompute.model_copy(update=unpicked)})
    found = PresetSpec(
        share=preset.share if spec.share is None else spec.share,
        realigner=preset.realigner if spec.realigner is None else spec.realigner,
        recompute=preset.recompute if spec.recompute is None else spec.recompute.changed(preset.recompute),
        blocks=preset.blocks if spec.blocks is None else spec.blocks,
        repeats=preset.repeats if spec.repeats is None else spec.repeats,
    )
    anchors = found.realigner is RealignerKind.ANCHORS
    if anchors and found.blocks:
        raise ValueError("`realigner: anchors` keeps offsets of single segments; expected `blocks: false`")
    if anchors and (found.repeats or found.recompute != Recompute(fixed=False)):
        raise ValueError(
            "`realigner: anchors` computes a call whole or nothing of its slots and fixed text; expected "
            "`repeats: false` and no other `recompute` than {fixed: false}"
        )
    if found.recompute.by in BY_REALIGNER and not found.realigner.ranks:
        ranking = listing(kind for kind in RealignerKind if kind.ranks)
        raise ValueError(
            f"`by: {found.recompute.by}` asks what `realigner: {ranking}` has seen; found `realigner: "
            f"{found.realigner}`, expected `{ranking}`, or `by: attention` or `deviation`"
        )
    if not anchors and not found.recompute.fixed:
        raise ValueError(f"`fixed: false` places fixed text, which `realigner: {found.realigner}` cannot; use anchors")
    return found


def specs(base: CommunicatorSpec, names: Sequence[str]) -> dict[str, CommunicatorSpec]:
    """The settings that presets are compared with: a mesh's own for its own preset, each other's defaults."""
    plain = {"share": None, "realigner": None, "recompute": None, "blocks": None, "repeats": None}
    return {name: base if name == base.preset else base.model_copy(update={**plain, "preset": name}) for name in names}


def settings(chosen: Mapping[str, CommunicatorSpec]) -> dict[str, Any]:
    """What a comparison says of its presets: limits, and the choices they resolve to."""
    found = {}
    for name, spec in chosen.items():
        found[name] = {**spec.model_dump(mode="json", exclude_none=True), **choices(spec).model_dump(mode="json")}
    return found
