"""Normalised cuts: exact against a dense solver, the same in every run; what cannot be cut is said."""

import operator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse.attention import ncut as module
from sdcourse.attention.ncut import (
    Palette,
    adjusted_rand,
    aligned,
    graph_of,
    kway,
    largest_angle,
    ncut,
    recursive_cuts,
    segments_iou,
    stability,
    two_way,
)
from sdcourse.core import UserError


def clouds(*sizes, seed=0, d=6, spread=0.35):
    "Features around as many centres, one after the other."
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(n, d)) * spread + 2 * np.eye(d)[i] for i, n in enumerate(sizes)])


def dense(a, k):
    "Eigenvalues and eigenvectors by numpy's solver of the whole matrix."
    root = a.sum(1) ** -0.5
    values, vectors = np.linalg.eigh(a * root * root[:, None])
    return values[::-1][:k], vectors[:, ::-1][:, :k]


@pytest.fixture(scope="module")
def three():
    return graph_of(clouds(120, 100, 80), width=0.2)


@pytest.mark.parametrize("most", [1500, 10])
def test_the_subspaces_are_those_of_a_dense_solver(three, monkeypatch, most):
    monkeypatch.setattr(module, "DENSE", most)
    values, vectors = dense(three, 30)
    found = ncut(three, 30)
    assert np.abs(found.values - values).max() <= 1e-9
    for k in (1, 3, 10, 29):
        assert largest_angle(found.vectors[:, :k], vectors[:, :k]) <= 1e-3
    assert np.abs(found.vectors.T @ found.vectors - np.eye(30)).max() <= 1e-8


def test_two_blobs_are_split_exactly():
    a = graph_of(clouds(37, 23), width=0.1)
    truth = np.repeat([0, 1], [37, 23])
    side, price = two_way(a)
    assert ncut(a, 6).segments() == 2 and price < 0.2
    for labels in (side == side[0], kway(ncut(a, 2).vectors, 2) == 0, recursive_cuts(a, 2) == 0):
        assert ((labels == labels[0]) == (truth == 0)).all()


def test_the_best_threshold_is_the_best_of_all():
    size = np.exp(np.random.default_rng(16).normal(0, 1.2, 15))  # degrees so uneven that their root matters
    a = graph_of(clouds(9, 6, spread=1.0, seed=16), width=0.3) * np.outer(size, size)
    side, price = two_way(a)

    def cost(mask):
        between = a[mask][:, ~mask].sum()
        return between / a[mask].sum() + between / a[~mask].sum()

    found = ncut(a, 2)
    y = found.vectors[:, 1] / np.sqrt(found.degrees)
    assert price == pytest.approx(min(cost(y <= t) for t in np.sort(y)[:-1])) == pytest.approx(cost(side))


def test_a_graph_in_pieces_is_compared_as_a_subspace(three):
    a = np.zeros((480, 480))
    a[:300, :300] = three
    a[300:479, 300:479] = graph_of(clouds(90, 89, seed=1), width=0.2)
    a[479, 479] = 1
    found = ncut(a, 8)
    values, vectors = dense(a, 8)
    assert np.abs(found.values - values).max() <= 1e-9 and (found.values[:3] > 1 - 1e-12).all()
    assert largest_angle(found.vectors[:, :3], vectors[:, :3]) <= 1e-6
    assert largest_angle(found.vectors, vectors) <= 1e-3
    assert [(np.abs(v) > 1e-12).sum() for v in found.vectors.T[:3]] == [300, 179, 1]
    assert set(recursive_cuts(a, 3)[[0, 300, 479]]) == {0, 1, 2}


@pytest.mark.parametrize("most", [1500, 10])
def test_each_run_gives_the_same_bytes(three, monkeypatch, most):
    monkeypatch.setattr(module, "DENSE", most)
    first = ncut(three, 10)
    np.random.seed(1)
    torch.manual_seed(1)
    again = ncut(torch.from_numpy(three), 10)
    assert (first.vectors == again.vectors).all() and (first.values == again.values).all()


def test_other_order_of_nodes_gives_the_same_eigenvectors(three):
    order = np.random.default_rng(3).permutation(300)
    found, moved = ncut(three, 6), ncut(three[order][:, order], 6)
    assert np.abs(found.vectors[order] - moved.vectors).max() <= 1e-8
    assert adjusted_rand(kway(found.vectors, 3)[order], kway(moved.vectors, 3)) == 1


def test_no_sign_is_lost():
    "Two equal halves: the sum of entries and of cubes is 0."
    a = np.kron(np.eye(2), np.ones((4, 4))) + 0.01
    v = ncut(a, 2).vectors[:, 1]
    assert (v[:4] > 0.3).all() and (v[4:] < -0.3).all()


def test_padding_takes_no_part(three):
    rng = np.random.default_rng(0)
    keep = np.ones(340, bool)
    keep[rng.choice(340, 40, replace=False)] = False
    a = rng.random((340, 340)) * 5
    a[np.ix_(keep, keep)] = three
    found = ncut(a, 5, keep=keep)
    assert np.abs(found.vectors - ncut(three, 5).vectors).max() <= 1e-12
    assert (found.nodes == np.flatnonzero(keep)).all()


def test_pieces_equal_nodes_and_constant_features():
    same = ncut(graph_of(np.ones((5, 3))), 2)
    assert same.values[0] == pytest.approx(1) and abs(same.values[1]) <= 1e-12
    a = graph_of(np.repeat(clouds(4, 4), 2, axis=0), width=0.2)
    assert (kway(ncut(a, 2).vectors, 2) == np.repeat([0, 1], 8)).all()


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_agreement_beyond_chance_counts_pairs(labels):
    other = [(x * 7 + i) % 3 for i, x in enumerate(labels)]
    pairs = [(labels[i] == labels[j], other[i] == other[j]) for i in range(len(labels)) for j in range(i)]
    both, one, two = (sum(map(f, pairs)) for f in (all, operator.itemgetter(0), operator.itemgetter(1)))
    chance = one * two / len(pairs)
    expected = 1 if (one + two) / 2 == chance else (both - chance) / ((one + two) / 2 - chance)
    assert adjusted_rand(labels, other) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand(labels, [9 - x for x in labels]) == 1


def test_each_region_has_its_best_segment():
    assert segments_iou([0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert segments_iou([0, 1, 2, 2], [0, 0, 0, 0]) == 0.5
    found = stability([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 1, 1]])
    assert found["n"] == 3 and found["least"] < 0 < found["value"] + 0.5 < 1


def test_colours_stay_when_eigenvectors_turn(three):
    first = ncut(three, 5).vectors
    noisy = clouds(120, 100, 80) + 0.05 * np.random.default_rng(1).normal(size=(300, 6))
    other = ncut(graph_of(noisy, width=0.2), 5).vectors[:, [0, 2, 1, 4, 3]] * [1, -1, 1, -1, 1]
    palette = Palette.of(first[:, :3])
    away = [np.abs(palette.colours(v) - palette.colours(first[:, :3])).mean() for v in (
        aligned(other[:, :3], first[:, :3]), other[:, :3])]  # fmt: skip
    assert away[0] <= 0.05 < away[1]
    rgb = palette.colours(first[:, :3])
    means = [rgb[i : i + 80].mean(0) for i in (0, 120, 220)]
    assert min(np.abs(means[i] - means[j]).max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.5


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: ncut(np.ones((3, 2))), r"affinities of shape \[3, 2\]: give \[nodes, nodes\]"),
        (lambda: ncut(np.ones((1, 1)), 1), "1 node: there is nothing to cut"),
        (lambda: ncut(np.ones((3, 3)), 4), "4 eigenvectors of 3 nodes: give 1 to 3"),
        (lambda: ncut(np.array([[1, -0.5], [-0.5, 1]]), 1), "-0.5 between 0 and 1 is below 0"),
        (lambda: ncut(np.array([[1.0, np.nan], [1, 1]]), 1), "node 0 holds nan"),
        (lambda: ncut(np.diag([1.0, 0, 1]), 1), "node 1 has no edge at all"),
        (lambda: graph_of(np.array([[1.0], [np.inf]])), "features: node 1 holds inf"),
        (lambda: graph_of(np.array([[1.0], [0]])), "node 1 is 0 and points nowhere"),
        (lambda: graph_of(np.zeros((9000, 1))), "9,000 nodes: the exact solver takes 8,192"),
        (lambda: kway(np.eye(3), 4), "4 segments of 3 nodes"),
        (lambda: ncut(np.ones((3, 3)), 2).segments(), "2 eigenvectors show no gap after 2; ask for more"),
        (lambda: stability([[1, 2]]), "stability of 1 run"),
        (lambda: segments_iou([1], [1, 2]), "1 labels for 2 nodes"),
    ],
)
def test_what_cannot_be_cut_is_one_line(work, says):
    with pytest.raises(UserError, match=says):
        work()
