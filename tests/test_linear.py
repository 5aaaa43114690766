"""The linear realigner: closed form, prequential choices, and what is saved of it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from agentmesh.communicator.linkstate import Audited, LinkState
from agentmesh.communicator.pools import NewAnchor, Pools
from agentmesh.communicator.saved import Made, load, save
from agentmesh.config.presets import AnchorSpec, CommunicatorSpec
from agentmesh.errors import InputError
from agentmesh.kv.arena import KVShape
from agentmesh.kv.values import KV, Frame
from agentmesh.reasons import Reason
from agentmesh.sharing.anchors import Anchor, AnchoredFixed, AnchoredSlot, AnchorPool, Weighing, offset
from agentmesh.sharing.budget import Budget
from agentmesh.sharing.linear import SAMPLED_LAYERS, Linear, features, robust_weights
from agentmesh.sharing.linearmap import RANK, LinearMap

SHAPE = KVShape(3, 2, 8, torch.float32, torch.device("cpu"))
FIRST = {"first": 16}
MADE = Made.of("model", {"b": "text"}, CommunicatorSpec(preset="linear"))


def random_kv(seed: int, tokens: int = 60) -> KV:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(3, 2, tokens, 8, generator=generator) for _ in range(2))
    return KV(keys, values, Frame.FREE)


def shifted(base: KV, noise: float = 0.0, seed: int = 0) -> KV:
    """A truth that is a fixed linear map of its base; layer 0 stays as it is."""
    generator = torch.Generator().manual_seed(99)
    turn = 0.3 * torch.randn(8, 8, generator=generator)
    scatter = torch.Generator().manual_seed(seed)
    keys = base.keys + base.values @ turn + 0.2 + noise * torch.randn(base.keys.shape, generator=scatter)
    values = base.values - 0.1 * base.keys + noise * torch.randn(base.keys.shape, generator=scatter)
    keys[0], values[0] = base.keys[0], base.values[0]
    return KV(keys, values, Frame.FREE)


def learned(count: int, noise: float = 0.0) -> Linear:
    found = Linear.empty(SHAPE)
    for seed in range(count):
        base = random_kv(seed)
        found = found.learn(found.study(base, shifted(base, noise, seed), range(base.tokens)))
    return found


def error(found: KV, truth: KV) -> float:
    return float((found.keys - truth.keys).norm() + (found.values - truth.values).norm())


def test_a_linear_shift_is_learned_and_applied() -> None:
    base = random_kv(1000)
    truth = shifted(base)

    found = learned(8).realign(base, range(base.tokens)).fetch()

    assert error(found, truth) < 0.02 * error(base, truth)
    assert torch.equal(found.keys[0], base.keys[0])


def test_one_observation_gives_the_closed_form_of_weighted_ridge_regression() -> None:
    base = random_kv(3)
    truth = shifted(base, 0.5)
    known = Linear.empty(SHAPE).learn(Linear.empty(SHAPE).study(base, truth, range(base.tokens)))

    row = 3  # layer 1, head 1
    x = features(base, range(base.tokens))[row].double()
    y = torch.cat([truth.keys - base.keys, truth.values - base.values], dim=3).flatten(0, 1)
    w = robust_weights(y)[row].double()
    gram = (x * w[:, None]).T @ x
    strength = 0.03 * gram.diagonal().mean() + 1e-6
    wanted = torch.linalg.solve(gram + strength * torch.eye(len(gram)), (x * w[:, None]).T @ y[row].double())

    torch.testing.assert_close(known._solutions()[1][row].double(), wanted, atol=1e-3, rtol=1e-3)


def test_tokens_unlike_all_that_was_seen_have_the_largest_leverage() -> None:
    known, base = learned(4), random_kv(1000, 12)
    base.keys[1:, :, 7] *= 6.0
    base.values[1:, :, 7] *= 6.0

    found = known.leverage(base, range(30, 42))

    rows, gram = features(base, range(30, 42)).double(), known.gram.double()
    strength = 0.1 * gram.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-6
    whole = gram + strength[:, None, None] * torch.eye(gram.shape[1])
    wanted = torch.einsum("rtf,rfg,rtg->rt", rows, torch.linalg.inv(whole), rows)[2:].mean(dim=0)
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-3)
    assert int(found.argmax()) == 7
    assert float(found.max()) > 5 * float(found.median())
    assert float(learned(8).leverage(base, range(30, 42)).max()) < float(found.max()), "more was seen"


def test_the_tokens_that_are_moved_farthest_are_known() -> None:
    known, base = learned(4), random_kv(1000, 12)
    base.keys[1:, :, 7] *= 6.0
    base.values[1:, :, 7] *= 6.0

    found = known.moves(base, range(30, 42))

    sizes = known.map.sizes(base, range(30, 42), SAMPLED_LAYERS).flatten(0, 1)
    torch.testing.assert_close(found, (sizes / sizes.mean(dim=1, keepdim=True)).mean(dim=0), atol=1e-4, rtol=1e-3)
    assert int(found.argmax()) == 7
    assert float(known.moves(base, range(30, 42)).mean()) == pytest.approx(1.0), "against the mean of all of them"


def random_map(rank: int, rows: int = 8 * 3, dim: int = 64) -> tuple[torch.Tensor, LinearMap]:
    """An offset map ``[L·H, 2D + 4, 2D]``, eight directions of keys and of values large, and what is kept of it."""
    generator = torch.Generator().manual_seed(3)
    strengths = torch.full((dim,), 0.01)
    strengths[:8] = 1.0
    parts = []
    for scale in (0.1, 0.001):
        turned = torch.linalg.qr(torch.randn(rows, dim, dim, generator=generator)).Q
        parts.append(scale * torch.randn(rows, 2 * dim + 4, dim, generator=generator) * strengths @ turned)
    offsets = torch.cat(parts, dim=2)
    return offsets, LinearMap.of(offsets, torch.eye(2 * dim + 4).expand(rows, -1, -1), rank)


def made_of(known: LinearMap) -> torch.Tensor:
    """Its offsets, ``[L·H, 2D + 4, 2D]``."""
    rank = known.up.shape[1] // 2
    parts = (slice(None, rank), slice(rank, None))
    return torch.cat([known.down[:, :, part] @ known.up[:, part] for part in parts], dim=2)


def test_a_map_of_full_rank_is_the_regression() -> None:
    offsets, made = random_map(rank=64)

    torch.testing.assert_close(made_of(made), offsets, atol=1e-5, rtol=1e-4)


def test_what_is_kept_of_a_map_are_the_directions_that_move_keys_and_values_most() -> None:
    offsets, made = random_map(rank=8)

    for whole, kept in zip(offsets.chunk(2, dim=2), made_of(made).chunk(2, dim=2), strict=True):
        assert float((whole - kept).square().sum() / whole.square().sum()) < 0.001, "however small one part is"


def test_the_bytes_of_a_map_are_known_before_it_is_solved() -> None:
    offsets, made = random_map(RANK)

    assert LinearMap.bytes_of(24, 64) == made.nbytes == 4 * (made.down.numel() + made.up.numel())
    assert made.nbytes < 0.4 * offsets.nbytes


def test_how_far_tokens_are_moved_is_known_without_moving_them() -> None:
    _, made = random_map(rank=16)
    keys, values = torch.randn(2, 8, 3, 50, 64, generator=torch.Generator().manual_seed(4))
    base = KV(keys, values, Frame.FREE)

    found = made.sizes(base, range(50), slice(2, None))

    moved = made.apply(base, range(50), slice(2, None))
    offsets = torch.cat([moved.keys - keys[2:], moved.values - values[2:]], dim=3)
    torch.testing.assert_close(found, offsets.square().sum(dim=3), atol=1e-4, rtol=1e-3)


def test_layers_can_be_made_in_parts() -> None:
    known, base = learned(6), random_kv(50)

    whole = known.realign(base, range(4, 4 + base.tokens)).fetch()
    part = known.realign(base, range(4, 4 + base.tokens)).fetch(slice(1, 3))

    torch.testing.assert_close(part.keys, whole.keys[1:3])
    torch.testing.assert_close(part.values, whole.values[1:3])


def test_what_cannot_be_predicted_shrinks_to_no_offset() -> None:
    known = Linear.empty(SHAPE)
    for seed in range(12):
        base, noise = random_kv(seed, 12), random_kv(seed + 500, 12)
        truth = KV(base.keys + noise.keys, base.values + noise.values, Frame.FREE)
        known = known.learn(known.study(base, truth, range(base.tokens)))
    base = random_kv(77)

    moved = error(known.realign(base, range(base.tokens)).fetch(), base)

    assert moved < 0.15 * float(base.keys.norm() + base.values.norm())
    assert bool((known.trial.errors <= known.trial.energy * (1 + 1e-5)).all())


def test_the_state_does_not_grow_with_observations() -> None:
    assert learned(2).nbytes == learned(9).nbytes


def test_a_few_huge_offsets_do_not_lead_the_regression() -> None:
    base = random_kv(5)
    truth = shifted(base)
    truth.keys[:, :, 7] += 100.0
    offsets = torch.cat([truth.keys - base.keys, truth.values - base.values], dim=3).flatten(0, 1)

    weights = robust_weights(offsets)

    assert float(weights[2:, 7].max()) < 0.05 * float(weights[2:].median())


def test_links_are_saved_and_loaded_for_the_same_model_and_texts(tmp_path: Path) -> None:
    path, fresh = tmp_path / "r.safetensors", LinkState(Linear.empty(SHAPE), Linear.empty(SHAPE))
    known = learned(6)
    audits = (Audited(0.01, flip=True, residual=0.2), Audited(0.0, flip=False, residual=0.1))
    save(path, {"b read input": LinkState(known, Linear.empty(SHAPE), audits, wait=2)}, MADE)

    found = load(path, fresh, MADE)["b read input"]

    base = random_kv(8)
    assert found.exact.observations == 6
    assert found.deep.observations == 0
    assert (found.audits, found.wait) == (audits, 2)
    loaded, kept = (one.realign(base, range(base.tokens)).fetch() for one in (found.exact, known))
    assert torch.equal(loaded.keys, kept.keys)
    with pytest.raises(InputError, match="another model"):
        load(path, fresh, replace(MADE, fingerprint="other"))
    with pytest.raises(InputError, match="texts of b have changed"):
        load(path, fresh, replace(MADE, consumers={"b": "new text"}))
    more = Made.of("model", {"b": "text"}, CommunicatorSpec.model_validate({"preset": "linear", "recompute": FIRST}))
    with pytest.raises(
        InputError,
        match=r"other choices of the communicator \(recompute.first 8, here 16, recompute.most_first 0.2, here 1.0\)",
    ):
        load(path, fresh, more)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="agentmesh calibrate"):
        load(path, fresh, MADE)


def test_links_with_one_observation_each_are_saved(tmp_path: Path) -> None:
    """They began as one value, and share what it has not learned yet."""
    path, fresh = tmp_path / "r.safetensors", Linear.empty(SHAPE)
    first, second = (fresh.learn(fresh.study(random_kv(n), shifted(random_kv(n)), range(60))) for n in (1, 2))

    save(path, {"b read input": LinkState(first, fresh), "c read input": LinkState(second, fresh)}, MADE)

    assert {state.exact.observations for state in load(path, LinkState(fresh, fresh), MADE).values()} == {1}


def anchor(seed: int, tokens: int) -> Anchor:
    base = random_kv(seed, tokens)
    return Anchor(base, offset(base, shifted(base)), None)


def test_a_content_becomes_an_anchor_where_too_few_are_as_long_or_all_are_as_near() -> None:
    pool = AnchorPool(None, (anchor(1, 10), anchor(2, 50), anchor(3, 50)))
    even = AnchorPool(None, (anchor(4, 30), anchor(4, 30)))

    assert pool.weigh(random_kv(9, 51), 0.3) is Reason.NO_ANCHOR_AS_LONG
    assert even.weigh(random_kv(9, 30), 0.3) is Reason.ANCHORS_TOO_EVEN
    assert isinstance(pool.weigh(random_kv(2, 50), 0.3), Weighing)


def test_an_anchor_predicts_its_own_content() -> None:
    pool = AnchorPool(None, (anchor(2, 50), anchor(3, 50)))
    far = Anchor(KV(pool.anchors[1].base.keys + 50, pool.anchors[1].base.values + 50, Frame.FREE), *_rest(pool))
    base = random_kv(2, 50)

    found = AnchoredSlot(base, (pool.anchors[0], far)).fetch()

    torch.testing.assert_close(found.keys, shifted(base).keys, atol=1e-4, rtol=1e-4)


def _rest(pool: AnchorPool) -> tuple[KV, None]:
    return pool.anchors[1].slot, None


def test_a_slot_takes_the_offsets_of_its_anchors_weighed_for_each_token() -> None:
    """Equation 6: a softmax of negative distances between bases, over all layers; keys and values have their own."""
    base = random_kv(50, 10)
    anchors = tuple(Anchor(random_kv(n, 10 + n), random_kv(100 + n, 10 + n), None) for n in range(3))

    found = AnchoredSlot(base, anchors).fetch()

    for kind in ("keys", "values"):
        for token in (0, 4, 9):
            mine = getattr(base, kind)[:, :, token]
            distances = [(getattr(a.base, kind)[:, :, token] - mine).abs().mean() for a in anchors]
            powers = [math.exp(-float(distance)) for distance in distances]
            offsets = [getattr(a.slot, kind)[:, :, token] for a in anchors]
            parts = [power / sum(powers) * offset for power, offset in zip(powers, offsets, strict=True)]
            torch.testing.assert_close(getattr(found, kind)[:, :, token], mine + torch.stack(parts).sum(dim=0))
    part = AnchoredSlot(base, anchors).fetch(slice(1, 3))
    torch.testing.assert_close(part.keys, found.keys[1:3])
    one = AnchoredSlot(base, anchors[:1]).fetch()
    torch.testing.assert_close(one.values, base.values + anchors[0].slot.values[:, :, :10])


def test_fixed_text_behind_a_slot_takes_the_weighed_offsets_of_its_anchors() -> None:
    """Equation 7: weights for each layer, head and dim, from the distance of the tokens next to the fixed text."""
    slot, fixed = random_kv(50, 10), random_kv(60, 6)
    anchors = tuple(Anchor(random_kv(n, 10 + n), random_kv(100 + n, 10 + n), random_kv(200 + n, 6)) for n in range(3))

    found = AnchoredFixed(fixed, slot, anchors, tokens=4).fetch()

    for kind in ("keys", "values"):
        for at in ((1, 0, 3), (2, 1, 7)):
            layer, head, dim = at
            near = getattr(slot, kind)[layer, head, :, dim]
            distances = [(getattr(a.base, kind)[layer, head, -10:, dim] - near).norm() for a in anchors]
            weights = (-torch.stack(distances)).softmax(dim=0)
            offsets = torch.stack([getattr(a.fixed, kind)[layer, head, :4, dim] for a in anchors])
            wanted = getattr(fixed, kind)[layer, head, :4, dim] + weights @ offsets
            torch.testing.assert_close(getattr(found, kind)[layer, head, :, dim], wanted)
    one = AnchoredFixed(fixed, slot, anchors[:1], tokens=6).fetch()
    assert anchors[0].fixed is not None
    torch.testing.assert_close(one.keys, fixed.keys + anchors[0].fixed.keys)


def test_the_least_used_of_the_oldest_anchors_makes_room() -> None:
    anchors = tuple(anchor(seed, 10) for seed in range(4))
    pool = AnchorPool(None, anchors).used((anchors[0].mark, anchors[2].mark))

    grown = pool.add(anchor(9, 10), limit=4, window=3)

    assert [one.base.keys.data_ptr() for one in grown.anchors[:3]] == [
        pool.anchors[index].base.keys.data_ptr() for index in (0, 2, 3)
    ]
    assert len(grown.anchors) == 4


def test_a_use_counts_for_its_anchor_whatever_left_the_pool_meanwhile() -> None:
    pool = AnchorPool(None, tuple(anchor(seed, 10) for seed in range(4)))
    weighing = pool.weigh(pool.anchors[2].base, gamma=1.0)
    assert isinstance(weighing, Weighing)
    later = pool.add(anchor(9, 10), limit=4, window=1)  # the oldest one goes, and all others move up

    used = later.used(weighing.used)

    assert weighing.used == (pool.anchors[2].mark,)
    assert [one.uses for one in used.anchors] == [0, 1, 0, 0]


def test_anchors_of_runs_that_overlap_refer_to_one_base_of_their_fixed_text() -> None:
    """Each run takes what it read first as the base; the pool keeps one, and offsets must be from that one."""
    pools, runs = Pools(AnchorSpec(), Budget(1 << 24)), {"a": random_kv(1, 6), "b": random_kv(2, 6)}
    for order, run in enumerate(runs):
        pools.ledger.view(run, order, None)
    for seed, (run, read) in enumerate(runs.items()):
        found = replace(anchor(seed, 10), fixed=offset(read, read))
        pools.ledger.note(run, "slot", NewAnchor(found, read))
    for run in runs:
        pools.ledger.end(run)

    pool = pools.ledger.states["slot"]
    assert pool.fixed is runs["a"]
    for one, read in zip(pool.anchors, runs.values(), strict=True):
        assert one.fixed is not None
        torch.testing.assert_close(pool.fixed.keys[1:] + one.fixed.keys[1:], read.keys[1:])
        torch.testing.assert_close(pool.fixed.values[1:] + one.fixed.values[1:], read.values[1:])


def test_runs_that_all_began_with_nothing_teach_as_much_as_one_after_the_other() -> None:
    nothing = Linear.empty(SHAPE)
    findings = [nothing.study(random_kv(seed), shifted(random_kv(seed)), range(60)) for seed in range(8)]

    together = nothing
    for finding in findings:
        together = together.learn(finding)

    one_by_one = learned(8)
    torch.testing.assert_close(made_of(together.map), made_of(one_by_one.map))
    assert float(together.trial.shrinkage[:, SHAPE.heads :].max()) > 0.9


def test_a_trial_from_sums_is_the_trial_of_every_token() -> None:
    known, base = learned(5, noise=0.3), random_kv(60)
    truth = shifted(base, 0.3, 60)
    finding = known.study(base, truth, range(base.tokens))
    y = torch.cat([truth.keys - base.keys, truth.values - base.values], dim=3).flatten(0, 1)
    weight = robust_weights(y)[..., None]

    trial = finding.trial(known._solutions())

    for number, solution in enumerate(known._solutions()):
        guess = features(base, range(base.tokens)) @ solution
        cross = (guess * y * weight).sum(1).view(len(y), 2, -1).sum(2)
        square = (guess * guess * weight).sum(1).view(len(y), 2, -1).sum(2)
        torch.testing.assert_close(trial.cross[number], cross, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(trial.square[number], square, atol=1e-2, rtol=1e-3)
