"""A chain whose second agent copies what it was handed: the third one gets these words from where it had read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from agentmesh.bench.rig import Call, Rig, observe
from agentmesh.communicator import Preset, make
from agentmesh.communicator.slots import SlotPlan
from agentmesh.config.mesh import ModelSpec
from agentmesh.config.presets import CommunicatorSpec, Picking, RecomputeSpec
from agentmesh.engine.loading import LoadedModel, load
from agentmesh.engine.probe import Support, probe
from agentmesh.prompt import Content, ContentKind, Prompt, Reader, Segment
from agentmesh.reasons import Reason
from agentmesh.sharing.repeats import AHEAD


@pytest.fixture(scope="module")
def tiny() -> tuple[LoadedModel, Support]:
    loaded = load(ModelSpec(name="random:tiny-llama"))
    return loaded, probe(loaded.model, loaded.step)


def words(seed: int, count: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(50, 250, (count,), generator=generator).tolist())


def slot(name: str, tokens: tuple[int, ...], kind: ContentKind = ContentKind.MESSAGE) -> Segment:
    return Segment(name, name, tokens, Content(name, kind, name, tokens))


@dataclass(frozen=True)
class Chain:
    """Three agents in a chain; ``copied`` tokens of the second message stand in the first, too."""

    question: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    copied: slice
    fixed: tuple[int, ...]

    @property
    def calls(self) -> tuple[Call, Call, Call]:
        first, second = slot("first", self.first), slot("second", self.second)
        return (
            self._call("a", (), "first", self.first),
            self._call("b", (first,), "second", self.second),
            self._call("c", (second,), "third", self.fixed),
        )

    def _call(self, agent: str, heard: tuple[Segment, ...], writes: str, message: tuple[int, ...]) -> Call:
        between = Segment("fixed", "", self.fixed)
        own = Segment("fixed", "", self.fixed[ord(agent) - ord("a") :] * 2)
        segments = [own, slot("question", self.question, ContentKind.INPUT), between]
        segments += [*heard, between] if heard else []
        awaited = {"question": 1, "first": 1, "second": 1}
        return Call(
            Prompt(tuple(segments), reader=Reader("r", consumer=agent, awaited=awaited, writes=writes)), message
        )


RANDOM = Chain(
    words(1, 40), words(2, 80), (*words(3, 20), *words(2, 80)[5:75], *words(4, 20)), slice(20, 90), words(9, 9)
)


def run(preset: Preset, rig: Rig, chain: Chain) -> SlotPlan:
    """The first two calls dense; the plan of the third."""
    for one in chain.calls[:2]:
        observe(preset, one, rig.dense(one))
    plan = preset.plan(chain.calls[2].prompt)
    assert isinstance(plan, SlotPlan)
    return plan


@pytest.mark.parametrize("name", ["rotate", "epic", "blend"])
def test_copied_words_are_placed_from_where_they_were_read(tiny: tuple[LoadedModel, Support], name: str) -> None:
    loaded, support = tiny
    rows = run(make(CommunicatorSpec(preset=name, repeats=True), support, loaded), Rig(support.runner), RANDOM).rows

    copied = [row for row in rows if row.reason is Reason.COPIED]
    picked = sum(row.tokens for row in rows if row.reason is Reason.PICKED)
    assert 70 - AHEAD - picked <= sum(row.tokens for row in copied) <= 70 - AHEAD
    assert {row.source for row in copied} == {"b"}
    assert sum(row.tokens for row in rows) == len(RANDOM.calls[2].prompt.tokens)


@pytest.mark.model
def test_their_kv_is_much_nearer_to_a_dense_prefill_than_what_the_writer_had(smollm2: LoadedModel) -> None:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(smollm2.tokenizer.encode(text, add_special_tokens=False))

    shared = (
        " each box holds six eggs, so that five boxes hold six times five eggs, which are thirty eggs in all. If two of"
        " them break on the way, twenty-eight eggs are left to be sold at the market on Saturday."
    )
    first, lead = encode("We know that" + shared), encode("Let me say it again:")
    second = (*lead, *encode(shared), *encode(" That is all."))
    question = encode("A box holds six eggs. How many eggs are in five boxes, if two of them break?")
    copied = slice(len(lead), len(lead) + len(encode(shared)))
    chain = Chain(question, first, second, copied, encode("\n\nThe next one of the team says:\n"))
    support = probe(smollm2.model, smollm2.step)
    rig = Rig(support.runner)
    plan = run(make(CommunicatorSpec(preset="rotate", repeats=True), support, smollm2), rig, chain)
    begin = chain.calls[2].prompt.starts[3]
    rows = slice(begin + copied.start + AHEAD, begin + copied.stop)

    truth = rig.dense(chain.calls[2]).arena
    found = rig.composed(chain.calls[2], plan.composition).arena
    written = plan.decisions[1].match.cut(rows.start, rows.stop)

    nearer = (found.values[1:, :, rows] - truth.values[1:, :, rows]).norm()
    farther = (written.values[1:] - truth.values[1:, :, rows]).norm()
    assert float(nearer) < 0.5 * float(farther)


def test_a_look_at_the_cache_sees_copied_words_where_they_are_placed_from(tiny: tuple[LoadedModel, Support]) -> None:
    loaded, support = tiny
    rig, looking = Rig(support.runner), RecomputeSpec(ratio=0.1, by=Picking.ATTENTION)
    plan = run(make(CommunicatorSpec(preset="rotate", repeats=True, recompute=looking), support, loaded), rig, RANDOM)

    looked = rig.composed(RANDOM.calls[2], plan.composition)
    made = rig.composed(RANDOM.calls[2], replace(plan.composition, ready=None))

    assert plan.composition.ready is not None
    visible = slice(0, made.arena.length)
    torch.testing.assert_close(looked.arena.keys[:, :, visible], made.arena.keys[:, :, visible])
    torch.testing.assert_close(looked.logits, made.logits)
