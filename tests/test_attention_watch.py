"""What a look sums: attention times the norm of what is attended to, against brute force."""

from __future__ import annotations

import pytest
import torch

from agentmesh.engine.attention import AttentionWatch

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
