"""Kernel distances, the four shares and intervals against brute force, closed forms and repetition."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sdcourse.core import UserError
from sdcourse.evaluation.distances import (
    FID_LEAST,
    Number,
    cmmd,
    cubic,
    kernel_distance,
    kid,
    measured,
    mmd2,
    paired,
    prdc,
    spread,
)
from sdcourse.evaluation.stats import frechet


def normal(n, d, seed, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kid_is_the_double_loop_over_different_pairs():
    a, b = normal(13, 5, 1), normal(9, 5, 2, 0.4)
    k = lambda x, y: (float(x @ y) / 5 + 1) ** 3
    within = lambda x: np.mean([k(p, q) for p, q in itertools.permutations(x, 2)])
    want = within(a) + within(b) - 2 * np.mean([k(p, q) for p in a for q in b])
    assert kid(a, b)["value"] == pytest.approx(want, rel=1e-9) and kid(b, a)["value"] == pytest.approx(
        want, rel=1e-9
    )


@pytest.mark.parametrize("n, m", [(7, 9), (1000, 400), (2300, 1100)])
def test_kid_in_blocks_is_kid_at_once(n, m):
    "The value and its error, over the edges of the squares that are added up."
    from sdcourse.evaluation.distances import _jackknife_error, _random_parts

    a, b = normal(n, 4, 1).float(), normal(m, 4, 2, 0.3).float()
    x, y = a.double(), b.double()
    kaa, kbb, kab = cubic(x, x), cubic(y, y), cubic(x, y)
    parts = min(20, n // 2, m // 2)
    p, q = _random_parts(n, parts), _random_parts(m, parts)
    left = torch.tensor(
        [mmd2(kaa[i][:, i], kbb[j][:, j], kab[i][:, j]) for i, j in ((p != k, q != k) for k in range(parts))]
    )
    found = kid(a, b)
    assert found["value"] == pytest.approx(mmd2(kaa, kbb, kab), rel=1e-9)
    assert found["se"] == pytest.approx(_jackknife_error(left.double()), rel=1e-4)
    assert kernel_distance(a, b) == pytest.approx(found["value"], rel=1e-9)


MEMORY = """
import resource, sys, torch
from sdcourse.evaluation.distances import cmmd, kid, prdc
from sdcourse.evaluation.memorise import closeness, neighbours
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
a, b = torch.randn(2, 8000, 8, generator=torch.Generator().manual_seed(0))
for n in (4000, 8000):
    kid(a[:n], b[:n]), cmmd(a[:n], b[:n]), prdc(a[:n], b[:n])
    closeness(neighbours(a[:n], b[:n])[1], neighbours(b[:n], a[:n])[1])
    print(peak())
"""


def test_memory_does_not_grow_with_the_sets():
    "Cases 47 and 56: twice the pictures, a tenth more at most."
    import subprocess, sys

    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    small, large = map(int, done.stdout.split())
    assert large <= 1.1 * small, (small, large)


def test_equal_pictures_are_inside_each_others_balls():
    "Case 23: their radius is 0."
    same = torch.ones(24, 3)
    found = prdc(same, same)
    assert [found[k] for k in ("precision", "recall", "coverage")] == [1, 1, 1] and found["density"] == 24 / 5
    other = prdc(same + 1, same)
    assert [other[k] for k in ("precision", "recall", "density", "coverage")] == [0, 0, 0, 0]


def test_a_number_that_is_not_finite_is_marked():
    import json

    row = Number("x", math.nan, 4, -math.inf, 1.0, note="few").row()
    assert row == dict(name="x", value=None, n=4, low=None, high=1.0, note="few; value is nan; low is -inf")
    json.dumps(row, allow_nan=False)


def test_kid_is_unbiased():
    "E4: 200 draws of equal distributions."
    found = np.array([kid(normal(60, 6, s), normal(60, 6, 1000 + s), blocks=2)["value"] for s in range(200)])
    assert abs(found.mean()) < 3 * found.std() / math.sqrt(200) and (found < 0).any()


def test_the_error_of_kid_does_not_know_the_order_of_pictures():
    """Ten classes in turn: every twentieth picture is of one class, and to leave out a class is not to leave
    out pictures at random.
    """
    label, g = torch.arange(400) % 10, torch.Generator().manual_seed(0)
    a, b = (4 * F.one_hot(label, 10) + torch.randn(400, 10, generator=g) for _ in range(2))
    mixed, b = torch.randperm(400, generator=g), b[torch.randperm(400, generator=g)]
    assert 0.6 < kid(a, b)["se"] / kid(a[mixed], b)["se"] < 1.6


@pytest.mark.parametrize("shift, low, high", [(0.0, 1.2, 1.8), (0.3, 0.8, 1.25)])
def test_the_error_of_kid_is_its_spread_or_a_little_more(shift, low, high):
    """By repetition: right for sets that differ, the root of two too large for equal ones, where the
    statistic is degenerate.
    """
    found = [kid(normal(200, 16, s, shift), normal(200, 16, 1000 + s)) for s in range(100)]
    ratio = math.sqrt(np.mean([f["se"] ** 2 for f in found])) / np.std([f["value"] for f in found])
    assert low < ratio < high


def test_cmmd_is_the_double_loop():
    "E4"
    a, b = normal(15, 6, 1), normal(11, 6, 2, 0.5)
    unit = lambda x: x / x.norm()
    k = lambda x, y: math.exp(-((unit(x) - unit(y)) ** 2).sum().item() / 200)
    mean = lambda x, y: np.mean([k(p, q) for p in x for q in y])
    assert cmmd(a, b) == pytest.approx(1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b)), abs=1e-6)
    assert cmmd(a, a) == pytest.approx(0, abs=1e-9) and cmmd(a, b) == pytest.approx(cmmd(7 * a, b), rel=1e-9)


def brute(a, b, k):
    dist = lambda p, q: math.dist(p.tolist(), q.tolist())
    radius = lambda x: [sorted(dist(p, q) for q in x)[k] for p in x]
    ra, rb = radius(a), radius(b)
    inside = [[dist(p, q) < r for q, r in zip(b, rb)] for p in a]
    back = [[dist(q, p) < r for p, r in zip(a, ra)] for q in b]
    return dict(
        precision=np.mean([any(r) for r in inside]),
        recall=np.mean([any(r) for r in back]),
        density=np.sum(inside) / (k * len(a)),
        coverage=np.mean([any(c) for c in zip(*inside)]),
        n=len(a),
    )


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("rows", [7, 1000])
def test_the_four_shares_are_brute_force(k, rows):
    "E5: N = 200, exactly."
    a, b = normal(200, 4, 1, 0.3), normal(200, 4, 2) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    assert prdc(a, b, k=k, rows=rows) == pytest.approx(brute(a, b, k), abs=1e-12)


def test_identical_sets_are_perfect():
    a = normal(200, 8, 3)
    found = prdc(a, a)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1) and found[
        "density"
    ] == pytest.approx(1)  # each lies in its own ball and in four others on average


def test_the_interval_of_a_mean_is_the_textbooks_one():
    x = normal(400, 1, 5)[:, 0]
    assert spread(lambda rows: x[rows].mean().item(), 400, draws=2000) == pytest.approx(
        x.std().item() / 20, rel=0.06
    )


def test_blocks_that_belong_together_are_drawn_together():
    "Twenty photographs of twenty equal crops: what varies is the photographs."
    photo = normal(20, 1, 6)[:, 0]
    x, names = photo.repeat_interleave(20), [f"photo {i // 20}" for i in range(400)]
    alone, together = (
        spread(lambda rows: x[rows].mean().item(), 400, blocks=blocks, draws=2000) for blocks in (None, names)
    )
    assert (
        together == pytest.approx(photo.std(correction=0).item() / math.sqrt(20), rel=0.06)
        and together > 4 * alone
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    hits = 0
    for s in range(100):
        x = normal(50, 1, s)[:, 0]
        n = measured("mean", lambda a, b: a.mean().item(), x, x, draws=200, seed=s)
        hits += n.low < 0 < n.high
    assert 88 <= hits <= 99


def test_a_number_carries_what_is_needed():
    x, y, z = normal(300, 4, 1), normal(300, 4, 2), normal(500, 4, 3)
    n = measured("FD[tiny]", frechet, x, y, real=z, draws=50, how={"resize": "pil"}, seed=7)
    assert (
        n.row() == measured("FD[tiny]", frechet, x, y, real=z, draws=50, how={"resize": "pil"}, seed=7).row()
    )
    assert (
        n.n == 300
        and n.low < n.value < n.high
        and n.floor <= n.floor_high < 3 * n.floor
        and n.how == {"resize": "pil", "seed": 7}
    )
    assert (
        str(n).startswith("FD[tiny] 0.0")
        and "at N=300; real against real" in str(n)
        and "note" not in n.row()
    )
    assert "low" not in Number("x", 1.0, 2).row()


def test_a_fid_of_few_pictures_is_refused_or_says_that_it_is_biased():
    "E6"
    x, y = normal(FID_LEAST - 1, 2, 1), normal(FID_LEAST, 2, 2)
    with pytest.raises(UserError, match="FID of 2047 images says nothing: below 2,048"):
        measured("FID", frechet, x, y)
    with pytest.raises(UserError, match="says nothing"):
        measured("FID", frechet, y, x)
    forced = measured("FID", frechet, x, y, force=True, draws=0)
    assert "biased: N=2047" in str(forced) and forced.row()["note"] == "biased: N=2047 is below 2,048"
    assert measured("FID", frechet, y, normal(FID_LEAST, 2, 3), draws=0).note == ""


def test_pairs_are_compared_pair_by_pair():
    hard = normal(200, 1, 1)[:, 0]
    ours, theirs = hard + 0.1 * normal(200, 1, 2)[:, 0], hard + 0.05 + 0.1 * normal(200, 1, 3)[:, 0]
    n = paired("difference", ours, theirs)
    se = (ours - theirs).std().item() / math.sqrt(200)
    assert (
        n.value == pytest.approx((ours - theirs).mean().item())
        and (n.high - n.low) / 2 == pytest.approx(1.96 * se, rel=0.1)
        and n.high < 0
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: kid(torch.zeros(9, 2), torch.zeros(9, 3)), r"features are \[n,d\]"),
        (lambda: kid(torch.zeros(3, 2), torch.zeros(9, 2)), "too few"),
        (lambda: prdc(torch.zeros(5, 2), torch.zeros(5, 2)), "at least 6"),
        (lambda: prdc(torch.zeros(9, 2), torch.zeros(8, 2)), "9 images against 8"),
        (lambda: cmmd(torch.full((4, 2), math.nan), torch.zeros(4, 2)), "not finite"),
        (lambda: spread(float, 4, blocks=[1, 1, 2]), "3 blocks for 4 images"),
        (lambda: spread(float, 2, blocks=[1, 1]), "of one block"),
        (lambda: paired("x", torch.zeros(3), torch.zeros(4)), "pairs are"),
        (
            lambda: measured(
                "x", frechet, torch.randn(9, 2), torch.randn(9, 2), real=torch.randn(5, 2), draws=0
            ),
            "5 real images for the floor of 9",
        ),
    ],
)
def test_wrong_input_is_one_line(call, words):
    with pytest.raises(UserError, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_a_floor_can_have_the_classes_of_the_judged_pictures():
    "Three of class 0 and one of class 2, among six, five and four real ones; each draw another one."
    there = torch.tensor([0] * 6 + [1] * 5 + [2] * 4)
    real, drawn = torch.arange(15.0)[:, None].expand(15, 2), []
    measured(
        "FD[own]",
        lambda x, y: drawn.append(x[:, 0].long()) or float(len(x)),
        real[:4],
        real,
        real=real,
        draws=0,
        classes=(torch.tensor([2, 0, 0, 0]), there),
    )
    floors = drawn[1:]
    assert len(floors) == 5 and all(
        there[f].tolist() == [0, 0, 0, 2] and len(set(f.tolist())) == 4 for f in floors
    )
    assert len({tuple(f.tolist()) for f in floors}) > 1


def test_a_spread_of_zero_is_an_interval_and_an_unknown_one_is_none():
    "Equal pictures have an interval without width at their value, and not at zero."
    assert [Number.around("a", 2.0, half, 4).low for half in (0.5, 0.0, None)] == [1.5, 2.0, None]
    assert [Number.around("a", 2.0, half, 4).high for half in (0.5, 0.0, None)] == [2.5, 2.0, None]
