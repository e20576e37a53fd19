"""Data order and draws: pure functions of (seed, step, position)."""

import numpy as np
import torch
from scipy import stats

from sdcourse.engine.order import Draws, Order, Plan, key, micro_rows, permutation, rank_rows, weighted_epoch


def split(edges, **kw):
    return torch.cat([Draws(3, 7, range(a, b), **kw).normal("noise", (5,)) for a, b in zip(edges, edges[1:])])


def test_draws_do_not_depend_on_the_split():
    whole = split([0, 50])
    for edges in ([0, 25, 50], [0, 16, 32, 50], [0, 1, 2, 3, 33, 50], list(range(51))):
        assert torch.equal(whole, split(edges))


def test_draws_depend_on_everything_else():
    def first(seed=3, step=7, stream="noise", scope="train"):
        return Draws(seed, step, range(4), scope=scope).normal(stream, (5,))

    ref = first()
    for other in (first(seed=4), first(step=8), first(stream="posterior"), first(scope="validate")):
        assert (other - ref).abs().max() > 0.1


def test_blocks_are_independent():
    rows = Draws(0, 0, range(64)).normal("noise", (1000,))
    corr = torch.corrcoef(rows) - torch.eye(64)
    assert corr.abs().max() < 5 / 1000**0.5


def test_draws_have_their_distributions():
    d = Draws(0, 1, range(20_000))
    assert stats.kstest(d.normal("a").numpy(), "norm").pvalue > 0.01
    assert stats.kstest(d.uniform("b").numpy(), "uniform").pvalue > 0.01
    share = d.bernoulli("c", 0.1).float().mean().item()
    assert abs(share - 0.1) < 3 * (0.09 / 20_000) ** 0.5


def test_float64_draws_are_the_float32_numbers():
    a, b = (
        Draws(0, 0, range(5)).normal("n", (3,)),
        Draws(0, 0, range(5), dtype=torch.float64).normal("n", (3,)),
    )
    assert b.dtype == torch.float64 and torch.equal(a.double(), b)


def test_key_separates_its_parts():
    parts = [(0, 1), (1, 0), (1 << 32,), (0, 0, 1), (1,), ("1",), ("noise", 1), ("nois", 1), (2**63,)]
    assert len({key(*p) for p in parts}) == len(parts)


def test_an_epoch_is_a_permutation_and_epochs_differ():
    a, b = permutation(0, 0, 1000), permutation(0, 1, 1000)
    assert sorted(a) == sorted(b) == list(range(1000))
    assert (a != b).mean() > 0.9
    assert (permutation(1, 0, 1000) != a).mean() > 0.9


def test_order_is_pinned():
    "The order of a run must be the same in every later version: a resumed run depends on it."
    assert permutation(0, 0, 10).tolist() == [7, 5, 8, 0, 1, 4, 3, 6, 9, 2]


def test_every_item_once_per_epoch_when_batches_straddle():
    order = Order(50, seed=1)
    stream = np.concatenate([order.items(8 * s, 8 * s + 8) for s in range(25)])
    for epoch in range(4):
        assert sorted(stream[50 * epoch : 50 * epoch + 50]) == list(range(50))


def test_a_batch_larger_than_the_data_set():
    assert np.bincount(Order(3, 0).items(0, 12)).tolist() == [4, 4, 4]


def test_plan_is_the_same_stream_for_any_ranks_and_micro_batches():
    order = Order(50, seed=0)

    def steps(world, micro, start=0):
        per_rank = [
            [i for i in Plan(order, 8, tuple(micro_rows(rank_rows(8, r, world), micro)), start, 10)]
            for r in range(world)
        ]
        return [
            np.concatenate(
                [
                    np.concatenate(p[s * len(p) // (10 - start) : (s + 1) * len(p) // (10 - start)])
                    for p in per_rank
                ]
            ).tolist()
            for s in range(10 - start)
        ]

    whole = steps(1, 0)
    assert whole == steps(2, 0) == steps(1, 3) == steps(3, 2) == steps(8, 1)
    assert whole[6:] == steps(2, 3, start=6)


def test_rank_rows_cover_the_batch():
    for batch, world in ((8, 3), (5, 5), (256, 7)):
        rows = [rank_rows(batch, r, world) for r in range(world)]
        assert [i for r in rows for i in r] == list(range(batch))
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_weighted_epochs_are_systematic():
    w = np.array([1.0, 2.0, 3.0, 0.5, 3.5])
    counts = np.stack([np.bincount(weighted_epoch(w, 0, e), minlength=5) for e in range(1000)])
    expected = w / w.sum() * 5
    assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
    assert np.abs(counts.mean(0) - expected).max() < 0.05
    assert (counts.sum(1) == 5).all()
