"""What looks and ingested passages sum: attention times the norm of what is attended to, against brute force."""

from __future__ import annotations

import pytest
import torch

from agentmesh.engine import attention
from agentmesh.engine.attention import NEAR, AttentionWatch, TextWatch

HEADS, GROUPS, DIMS, KEYS, QUERIES = 2, 3, 8, 11, 5


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_watch_sums_what_queries_take_from_each_position(skip: int, *, masked: bool) -> None:
    made = torch.Generator().manual_seed(1)
    query = torch.randn(1, HEADS * GROUPS, QUERIES, DIMS, generator=made)
    key, value = torch.randn(2, 1, HEADS, KEYS, DIMS, generator=made).unbind(0)
    mask = torch.zeros(1, 1, QUERIES, KEYS)
    if masked:
        mask[..., 7:] = torch.finfo(torch.float32).min
    watch = AttentionWatch(skip)

    watch.see(query, key, value, mask if masked else None, 0.3)
    watch.see(query, key, value, mask if masked else None, 0.3)

    wanted = torch.zeros(KEYS)
    for head in range(HEADS * GROUPS):
        for row in range(skip, QUERIES):
            scores = 0.3 * key[0, head // GROUPS] @ query[0, head, row] + mask[0, 0, row]
            wanted += scores.softmax(dim=0) * value[0, head // GROUPS].norm(dim=-1)
    torch.testing.assert_close(watch.total, 2 * wanted)
    assert bool((watch.total[7:] == 0).all()) is masked


@pytest.mark.parametrize("at_once", [4, 1000])
def test_a_text_watch_sums_what_later_tokens_of_the_text_take(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES_AT_ONCE", at_once)
    made, header, tokens = torch.Generator().manual_seed(1), 3, 2 * NEAR + 3
    query = torch.randn(1, HEADS * GROUPS, header + tokens, DIMS, generator=made)
    key, value = torch.randn(2, 1, HEADS, header + tokens, DIMS, generator=made).unbind(0)
    watch = TextWatch(header, tokens)

    watch.see(query, key, value, None, None)

    wanted = torch.zeros(tokens)
    for head in range(HEADS * GROUPS):
        for row in range(header, header + tokens):
            seen = key[0, head // GROUPS, : row + 1]
            paid = (DIMS**-0.5 * seen @ query[0, head, row]).softmax(dim=0) * value[0, head // GROUPS, : row + 1].norm(
                dim=-1
            )
            paid[max(row - NEAR, 0) :] = 0
            wanted[: row + 1 - header] += paid[header:]
    torch.testing.assert_close(watch.total, wanted)
    assert (watch.total[-NEAR - 1 :] == 0).all()
    assert (watch.total[: -NEAR - 1] > 0).all()
