"""The segment store and matching: identity, blocks, depth, budget, eviction order, pins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agentmesh.kv.values import KV, Frame, join
from agentmesh.prompt import Content, ContentKind, Prompt, Reader, Segment
from agentmesh.reasons import Reason
from agentmesh.sharing.budget import Budget, Worth
from agentmesh.sharing.matching import Matcher, Relation
from agentmesh.sharing.repeats import AHEAD, GAP, copies, echoes, gaps
from agentmesh.sharing.segments import Reading, Rows, SegmentStore, Span

BYTES = 2 * 4 * 4


def kv(tokens: tuple[int, ...]) -> KV:
    """KV whose values are the token ids, so that a wrong hit would show."""
    data = torch.tensor(tokens, dtype=torch.float32).reshape(1, 1, -1, 1).expand(1, 1, len(tokens), 4).contiguous()
    return KV(data, data.clone(), Frame.FREE)


def content(name: str, length: int, kind: ContentKind = ContentKind.MESSAGE, deliver: str = "auto") -> Segment:
    """A slot whose tokens depend on its name."""
    tokens = tuple(1000 + 100 * (ord(name[-1]) - ord("a")) + i for i in range(length))
    return Segment(name, name, tokens, Content(name, kind, name, tokens, deliver))


def fixed(*tokens: int) -> Segment:
    return Segment("fixed", "", tokens)


def prompt(*segments: Segment, run: str = "r", consumer: str = "x") -> Prompt:
    return Prompt(segments, reader=Reader(run, consumer=consumer))


def reading(
    store: SegmentStore, source: Prompt, message: Segment | None = None, depth: int = 0, cut: int = 0
) -> Reading:
    """What a call with this prompt would have kept; ``cut`` tokens of the message have no KV."""
    spans = [
        Span(store.key(segment.tokens), segment.content.origin, start, start + len(segment.tokens))
        for segment, start in zip(source.segments, source.starts, strict=True)
        if segment.content is not None
    ]
    begin, tokens = spans[0].start, source.tokens
    rows = [Rows(begin, kv(tokens[begin:]))]
    if message is not None:
        assert message.content is not None
        size = len(message.tokens)
        spans.append(
            Span(store.key(message.tokens), message.content.origin, len(tokens), len(tokens) + size, written=True)
        )
        rows.append(Rows(len(tokens), kv(message.tokens[: size - cut])))
        tokens = (*tokens, *message.tokens)
    reader = source.reader
    return Reading(reader.run, reader.consumer, tokens, tuple(spans), tuple(rows), bytes([depth] * len(tokens)))


def store(budget: int = 1 << 20) -> SegmentStore:
    return SegmentStore(Budget(budget), b"model")


def test_slices_and_joins_are_identities() -> None:
    whole = kv(tuple(range(10)))

    assert torch.equal(join([whole.cut(0, 4), whole.cut(4, 10)]).keys, whole.keys)
    assert whole.cut(2, 5).cut(1, 3).keys.data_ptr() == whole.cut(3, 5).keys.data_ptr()


def test_a_run_of_segments_in_the_same_order_is_one_block_with_the_fixed_text_between() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    first = prompt(fixed(1, 2), q, fixed(5, 6), m, fixed(9), consumer="a")
    kept.add(reading(kept, first), {"q": 1, "m": 1})
    later = prompt(fixed(3, 3, 3), q, fixed(5, 6), m, fixed(7, 7))

    found = Matcher(kept, blocks=True, max_depth=2).match(later, 0)

    (match,) = found.matches
    assert (match.start, match.stop, match.relation, match.depth) == (3, 75, Relation.READ, 0)
    assert match.reading.cut(match.at, match.at + match.tokens).keys[0, 0, :, 0].tolist() == list(later.tokens[3:75])
    assert not found.missing


def test_without_blocks_every_slot_is_matched_by_itself() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(5), m, fixed(9), consumer="a")), {"q": 1, "m": 1})

    found = Matcher(kept, blocks=False, max_depth=2).match(prompt(fixed(3), q, fixed(5), m, fixed(7)), 0)

    assert [(match.start, match.stop) for match in found.matches] == [(1, 41), (42, 72)]


def test_other_text_between_two_slots_ends_the_block() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(5), m, fixed(9), consumer="a")), {"q": 1, "m": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), q, fixed(6), m, fixed(7)), 0)

    assert [match.tokens for match in found.matches] == [40, 30]


def copying(kept: SegmentStore, depth: int = 0) -> tuple[Segment, Segment]:
    """Somebody read a question and a message, and wrote a message that repeats 40 of its 50 tokens."""
    q, heard = content("q", 40), content("h", 50)
    words = (*content("w", 20).tokens, *heard.tokens[5:45], *content("v", 20).tokens)
    said = Segment("s", "s", words, Content("s", ContentKind.MESSAGE, "s", words))
    kept.add(reading(kept, prompt(fixed(1), q, fixed(5), heard, fixed(9), consumer="a"), said, depth), {"q": 1, "s": 1})
    return q, said


def test_words_copied_from_a_text_that_the_prompt_lacks_have_a_nearer_base() -> None:
    kept = store()
    q, said = copying(kept)
    later = prompt(fixed(3), q, fixed(5), said, fixed(7), consumer="b")
    asked, answer = Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches

    (found,) = copies(kept, later, answer, answer.start, 2)

    assert not list(copies(kept, later, asked, asked.start, 2))
    assert (found.relation, found.start, found.stop) == (Relation.COPIED, answer.start + 20 + AHEAD, answer.start + 60)
    assert found.at < answer.at
    assert found.cut(found.start, found.stop).keys[0, 0, :, 0].tolist() == list(later.tokens[found.start : found.stop])


def test_only_short_stretches_beside_copied_words_are_gaps() -> None:
    kept = store()
    q, said = copying(kept)
    later = prompt(fixed(3), q, fixed(5), said, fixed(7), consumer="b")
    answer = Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches[-1]
    (part,) = copies(kept, later, answer, answer.start, 2)

    behind = range(part.stop, answer.stop)
    assert part.start - answer.start > GAP
    assert list(gaps(answer, [part])) == [behind]
    assert not list(gaps(answer, []))


def test_words_copied_from_a_text_that_the_prompt_has_too_stay_as_they_were_written() -> None:
    kept = store()
    q, said = copying(kept)
    later = prompt(fixed(3), q, fixed(6), content("h", 50), fixed(8), said, fixed(7), consumer="b")

    for match in Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches:
        assert not list(copies(kept, later, match, match.start, 2))


def test_words_are_not_taken_from_rows_that_are_too_deep_nor_before_a_first_token() -> None:
    kept = store()
    q, said = copying(kept, depth=2)
    later = prompt(fixed(3), q, fixed(5), said, fixed(7), consumer="b")
    answer = Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches[-1]

    assert not list(copies(kept, later, answer, answer.start, 1))
    (found,) = copies(kept, later, answer, answer.start + 45, 2)
    assert found.start == answer.start + 45


def test_words_that_the_writer_could_not_know_to_be_repeated_are_echoes() -> None:
    kept, q = store(), content("q", 40)
    words = (*content("w", 20).tokens, *content("h", 50).tokens[5:45], *content("v", 20).tokens)
    heard, said = content("h", 50), Segment("s", "s", words, Content("s", ContentKind.MESSAGE, "s", words))
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), heard), {"q": 1, "h": 1})
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="b"), said), {"q": 1, "s": 1})
    later = prompt(fixed(3), q, fixed(5), heard, fixed(6), said, fixed(7), consumer="c")

    asked, first, second = Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches

    assert not [*echoes(later, asked), *echoes(later, first)]
    assert list(echoes(later, second)) == [range(second.start + 20, second.start + 60)]


def test_a_message_is_matched_from_what_its_writer_decoded_up_to_its_last_kv() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), m, cut=1), {"q": 1, "m": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), q, fixed(5), m, fixed(7)), 0)

    assert [(match.relation, match.tokens) for match in found.matches] == [(Relation.READ, 40), (Relation.WROTE, 29)]


def test_the_same_tokens_after_the_same_history_need_no_offset() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1, 2), q, fixed(9), consumer="a"), depth=1), {"q": 1})

    found = Matcher(kept, blocks=True, max_depth=0).match(prompt(fixed(1, 2), q, fixed(7)), 0)

    assert found.matches[0].relation is Relation.HISTORY


def test_kv_that_was_placed_too_often_is_no_base() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), depth=3), {"q": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), q, fixed(7)), 0)

    assert found.missing == {1: Reason.TOO_DEEP}


def test_what_was_written_but_never_decoded_behind_has_no_kv_and_is_not_too_deep() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), m, cut=30), {"q": 1, "m": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), m, fixed(7)), 0)

    assert found.missing == {1: Reason.NO_KV}


def test_offsets_that_belong_to_one_base_take_the_first_reading_whatever_carries_further() -> None:
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), m, depth=1), {"q": 1, "m": 1})
    kept.add(reading(kept, prompt(fixed(2), q, fixed(6), m, fixed(9), consumer="b")), {"q": 1, "m": 1})
    later = prompt(fixed(3), q, fixed(6), m, fixed(7))

    first = Matcher(kept, blocks=False, max_depth=2, oldest=True).match(later, 0)
    farthest = Matcher(kept, blocks=False, max_depth=2).match(later, 0)

    assert [(one.source, one.relation) for one in first.matches] == [("a", Relation.READ), ("a", Relation.WROTE)]
    assert {one.source for one in farthest.matches} == {"b"}


def test_among_readings_that_carry_as_far_the_shallowest_is_taken() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="exact")), {"q": 1})
    kept.add(reading(kept, prompt(fixed(2), q, fixed(9), consumer="deep"), depth=2), {"q": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), q, fixed(7)), 0)

    assert found.matches[0].source == "exact"


@pytest.mark.parametrize(("messages", "left"), [(1, 3), (2, 2), (3, 0)])
def test_what_is_left_behind_some_messages_of_a_block_begins_at_the_next_one(messages: int, left: int) -> None:
    """Neither the question nor a passage counts, and a single message is left to its writer."""
    kept, q, said = store(), content("q", 40, kind=ContentKind.INPUT), [content(name, 30) for name in "efgh"]
    paper = content("d", 20, kind=ContentKind.DOCUMENT)
    parts = [part for one in (paper, q, *said) for part in (fixed(5), one)]
    kept.add(reading(kept, prompt(*parts, fixed(9), consumer="a")), {"q": 1})
    later = prompt(fixed(3), *parts[1:], fixed(7), consumer="b")
    (block,) = Matcher(kept, blocks=True, max_depth=2).match(later, 0).matches

    rest = block.behind(later, messages)

    assert (rest is not None) == (left > 0)
    if rest is not None:
        assert later.segments[rest.first] == said[messages]
        assert (rest.stop, rest.kind) == (block.stop, ContentKind.MESSAGE)
        assert rest.cut(rest.start, rest.stop).keys[0, 0, :, 0].tolist() == list(later.tokens[rest.start : rest.stop])


@pytest.mark.parametrize("depth", [0, 1])
def test_of_equals_what_its_sender_wrote_is_taken_as_it_is_in_a_warm_run(depth: int) -> None:
    """A later reading of a message is one deeper once it was placed, and as deep while all is computed."""
    kept, q, m = store(), content("q", 40), content("m", 30)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), m, depth=depth), {"q": 1, "m": 1})
    kept.add(reading(kept, prompt(fixed(2), m, fixed(9), consumer="b"), depth=2 * depth), {"m": 1})

    (found,) = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), m, fixed(7)), 0).matches

    assert (found.source, found.relation) == ("a", Relation.WROTE)


def test_a_reader_of_exact_kv_never_sees_the_approximate_namespace() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a"), depth=1), {"q": 1})

    assert list(kept.find(q.tokens, "r", exact=True)) == []
    assert len(list(kept.find(q.tokens, "r"))) == 1


def test_other_runs_and_other_tenants_find_nothing() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), run="other", consumer="a")), {"q": 1})

    assert list(kept.find(q.tokens, "r")) == []
    assert SegmentStore(Budget(1), b"tenant").key(q.tokens) != kept.key(q.tokens)


def test_text_that_its_edge_delivers_as_text_is_not_matched() -> None:
    kept, q = store(), content("q", 40)
    kept.add(reading(kept, prompt(fixed(1), q, fixed(9), consumer="a")), {"q": 1})

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), content("q", 40, deliver="text")), 0)

    assert found.missing == {1: Reason.DELIVERED_AS_TEXT}


def test_what_nobody_awaits_is_evicted_first_and_then_what_is_read_last() -> None:
    kept = store(10**9)
    for name, awaited in (("a", {"a": 5}), ("b", {}), ("c", {"c": 1})):
        kept.add(reading(kept, prompt(fixed(1), content(name, 20), consumer=name)), awaited)

    kept.evict(1, Worth.IDLE)
    assert [name for name in "abc" if list(kept.find(content(name, 20).tokens, "r"))] == ["a", "c"]
    kept.evict(1, Worth.AWAITED)
    assert [name for name in "abc" if list(kept.find(content(name, 20).tokens, "r"))] == ["c"]
    assert kept.was_evicted(content("a", 20).tokens, "r")


def keep(kept: SegmentStore, name: str, awaited: int = 0, padding: int = 0) -> int | None:
    """A reading of two contents of 20 tokens; the text between them takes bytes and saves nothing."""
    first, second = content(name, 20), content(f"{name}{name}", 20)
    between = fixed(*range(1, padding + 1))
    source = prompt(fixed(1), first, between, second, consumer=name)
    return kept.add(reading(kept, source), {name: awaited} if awaited else {})


def evicted_in_turn(kept: SegmentStore) -> str:
    """Readers in the order in which their readings go, one at a time."""
    found = ""
    for worth in Worth:
        while True:
            before = {one.reader for _, one in kept.readings("r")}
            if not kept.evict(1, worth):
                break
            found += "".join(before - {one.reader for _, one in kept.readings("r")})
    return found


def test_what_is_read_soon_goes_last_however_old_it_is_and_however_little_it_saves() -> None:
    kept = store()
    keep(kept, "a", awaited=1, padding=30)
    keep(kept, "b", awaited=3, padding=30)
    keep(kept, "c", awaited=2)
    keep(kept, "d")

    assert kept.evict(10**9, Worth.LATER) == 0
    assert evicted_in_turn(kept) == "dbca"


def test_of_readings_with_the_same_next_use_the_one_that_saves_least_by_byte_goes_first() -> None:
    for awaited in (0, 2):
        kept = store()
        keep(kept, "a", awaited)
        keep(kept, "b", awaited, padding=30)
        keep(kept, "c", awaited, padding=10)

        assert evicted_in_turn(kept) == "bca"


def test_of_readings_that_save_as_much_the_oldest_goes_first() -> None:
    for awaited in (0, 2):
        kept = store()
        for name in "bac":
            keep(kept, name, awaited)

        assert evicted_in_turn(kept) == "bac"


def test_what_a_run_still_reads_decides_anew_after_each_visit() -> None:
    kept = store()
    for name in "abc":
        keep(kept, name, awaited=1)
    kept.pass_on("r", {"a": 2, "b": 1})

    assert evicted_in_turn(kept) == "cab"


def test_a_new_reading_pushes_out_only_as_much_as_it_needs_and_nothing_that_is_pinned() -> None:
    kept = store(3 * 40 * BYTES)
    numbers = [keep(kept, name, awaited) for name, awaited in (("a", 0), ("b", 5), ("c", 0))]
    assert numbers[0] is not None
    assert numbers[1] is not None
    kept.pin(numbers[0])

    def readers() -> str:
        return "".join(sorted(one.reader for _, one in kept.readings("r")))

    assert keep(kept, "d", awaited=1) is not None
    assert readers() == "abd", "c is idle, a would go before it"
    assert keep(kept, "e", awaited=2) is not None
    assert readers() == "ade", "b is read last"
    for number, one in list(kept.readings("r")):
        if one.reader != "a":
            kept.pin(number)
    assert keep(kept, "f") is None
    assert readers() == "ade"
    assert kept.was_evicted(content("f", 20).tokens, "r")
    kept.unpin(numbers[0])
    assert keep(kept, "f") is not None
    assert readers() == "def"


def test_pinned_readings_stay_and_released_runs_go() -> None:
    kept, q = store(10**9), content("q", 40)
    number = kept.add(reading(kept, prompt(fixed(1), q, consumer="a")), {})
    assert number is not None
    kept.pin(number)
    assert kept.evict(10**9, Worth.IDLE) == 0
    kept.unpin(number)

    kept.release("r")

    assert len(kept) == 0
    assert kept.nbytes == 0


class AnyOrder(RuleBasedStateMachine):
    """Appends, forks, evictions, pins and releases in any order keep the budget and never give foreign KV.

    A fork is a reading of what an earlier one holds, in another context: each lives as long as it would by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.store = SegmentStore(Budget(60 * BYTES), b"m")
        self.pins: list[int] = []

    @rule(
        run=st.sampled_from("rs"),
        name=st.sampled_from("abc"),
        length=st.integers(1, 25),
        awaited=st.integers(0, 3),
        message=st.booleans(),
        depth=st.integers(0, 3),
    )
    def add(self, run: str, name: str, length: int, awaited: int, message: bool, depth: int) -> None:
        said = content("m", length) if message else None
        source = prompt(fixed(1), content(name, length), run=run, consumer=name)
        self._keep(reading(self.store, source, said, depth), {name: awaited} if awaited else {})

    @rule(which=st.integers(0, 9), lead=st.integers(1, 5), depth=st.integers(0, 3), message=st.booleans())
    def fork(self, which: int, lead: int, depth: int, message: bool) -> None:
        """Somebody reads all that an earlier reading of the run holds behind another text, and may go on from it."""
        if not self.store._kept:
            return
        old, one = list(self.store._kept.items())[which % len(self.store._kept)]
        spans, said = one.reading.spans, content("m", 7).tokens if message else ()
        begin, stop = spans[0].start, spans[-1].stop
        tokens = (*[9] * lead, *one.reading.tokens[begin:stop], *said)
        moved = [replace(s, start=s.start + lead - begin, stop=s.stop + lead - begin, written=False) for s in spans]
        if said:
            moved.append(Span(self.store.key(said), "m", len(tokens) - len(said), len(tokens), written=True))
        rows, depths = (Rows(lead, kv(tokens[lead:])),), bytes([depth] * len(tokens))
        number = self._keep(Reading(one.reading.run, "fork", tokens, tuple(moved), rows, depths), {})
        for span in moved if number is not None else ():
            text = tokens[span.start : span.stop]
            found = {n for n, _, _ in self.store.find(text, one.reading.run)}
            assert number in found
            assert (old in found) == (old in self.store._kept) or span.written

    def _keep(self, new: Reading, awaited: dict[str, int]) -> int | None:
        """Whatever is not pinned makes room, for what nobody awaits only what nobody awaits, and nothing else."""
        kept_on = {n: kept for n, kept in self.store._kept.items() if kept.pins or (kept.awaited and not awaited)}
        pinned = {number: kept.reading for number, kept in kept_on.items()}
        held = sum(one.nbytes for one in pinned.values())
        number = self.store.add(new, awaited)
        assert (number is None) == (held + new.nbytes > self.store.budget.limit)
        assert all(self.store._kept[one].reading is kept for one, kept in pinned.items())
        return number

    @rule(length=st.integers(1, 12))
    def extend(self, length: int) -> None:
        for number in list(self.store._kept)[:1]:
            old = self.store._kept[number].reading
            tokens = tuple(range(5000, 5000 + length))
            span = Span(self.store.key(tokens), "late", len(old.tokens), len(old.tokens) + length, written=True)
            self.store.extend(number, span, tokens, Rows(len(old.tokens), kv(tokens)), 1, {})

    @rule()
    def pin(self) -> None:
        for number in list(self.store._kept)[-1:]:
            self.store.pin(number)
            self.pins.append(number)

    @rule()
    def unpin(self) -> None:
        if self.pins:
            self.store.unpin(self.pins.pop())

    @rule(run=st.sampled_from("rs"))
    def release(self, run: str) -> None:
        self.store.release(run)

    @rule(wanted=st.integers(1, 500), worth=st.sampled_from(Worth))
    def evict(self, wanted: int, worth: Worth) -> None:
        pinned = {number for number, kept in self.store._kept.items() if kept.pins}
        self.store.evict(wanted, worth)
        assert pinned <= set(self.store._kept)

    @rule(run=st.sampled_from("rs"), name=st.sampled_from("abcm"), length=st.integers(1, 25))
    def find(self, run: str, name: str, length: int) -> None:
        tokens = content(name, length).tokens
        for _, found, span in self.store.find(tokens, run):
            assert found.run == run
            assert found.cut(span.start, span.stop).keys[0, 0, :, 0].tolist() == list(tokens)
        for _, found, span in self.store.find(tokens, run, exact=True):
            assert found.depth(span.start, span.stop) == 0

    @invariant()
    def the_budget_holds_and_the_count_is_true(self) -> None:
        sizes = [kept.reading.nbytes for kept in self.store._kept.values()]
        assert self.store.nbytes == sum(sizes) <= self.store.budget.limit


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_any_order_of_operations = AnyOrder.TestCase


def test_a_message_that_repeats_another_one_is_still_its_writers() -> None:
    kept, q, n = store(), content("q", 40), content("n", 30)
    m = replace(n, label="m", content=Content("m", ContentKind.MESSAGE, "m", n.tokens))
    kept.add(
        reading(kept, prompt(fixed(1), q, fixed(5), n, fixed(9), consumer="a"), m, cut=1), {"q": 1, "n": 1, "m": 1}
    )

    found = Matcher(kept, blocks=True, max_depth=2).match(prompt(fixed(3), q, fixed(5), n, fixed(6), m, fixed(7)), 0)

    assert [(match.relation, match.tokens) for match in found.matches] == [(Relation.READ, 71), (Relation.WROTE, 29)]
