"""Streaming statistics and the Fréchet distance against closed forms, two-pass formulas, SciPy and
pytorch-fid's files.
"""

import numpy as np
import pytest
import torch

import ranks
from sdcourse.core import UserError
from sdcourse.evaluation.stats import Stats, bias, frechet, frechet_gaussian, load_stats, save_stats, wilson


def cloud(n, d, seed):  # correlated, float64, away from the origin
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + torch.randn(
        d, generator=g, dtype=torch.float64
    )


# ---- shares


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for hits, n in ((0, 5), (8, 10), (495, 500), (500, 500)):
        want, got = binomtest(hits, n).proportion_ci(method="wilson"), wilson(hits, n)
        assert (got["value"], got["n"]) == (hits / n, n)
        assert (got["low"], got["high"]) == pytest.approx((want.low, want.high), abs=1e-6)
    for hits, n in ((3, 2), (0, 0), (-1, 2)):
        with pytest.raises(UserError, match=f"{hits} hits of {n}: a share needs"):
            wilson(hits, n)


# ---- Fréchet distance (ACCEPTANCE E1, E3)


def test_frechet_is_the_closed_form_for_diagonal_gaussians():
    rng = np.random.default_rng(0)
    for d in (1, 3, 64):
        m1, m2, s1, s2 = rng.normal(size=(2, d)).tolist() + rng.uniform(0.1, 3, size=(2, d)).tolist()
        m1, m2, s1, s2 = map(np.array, (m1, m2, s1, s2))
        want = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()
        assert frechet_gaussian(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("d", [4, 32])
def test_frechet_equals_scipy_sqrtm(d):
    from scipy.linalg import sqrtm

    a, b = cloud(500, d, 1), cloud(300, d, 2)
    ca, cb = np.cov(a.T), np.cov(b.T)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet(a, b) == pytest.approx(want, rel=1e-6)


def test_frechet_to_itself_is_zero_and_it_is_symmetric():
    a, b = cloud(200, 16, 3), cloud(150, 16, 4)
    assert frechet(a, a) <= 1e-6 * torch.cov(a.T).trace().item()
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-10)


def test_frechet_with_fewer_points_than_dimensions_is_real_and_right():
    a, b = cloud(10, 32, 5), cloud(12, 32, 6)
    assert frechet(a, a) <= 1e-6 * torch.cov(a.T).trace().item()
    # the bures term is the nuclear norm of the cross-product of the centred sets: an oracle without any root
    x, y = (z - z.mean(0) for z in (a, b))
    cross = torch.linalg.svdvals(x @ y.T).sum() / (9 * 11) ** 0.5
    want = (
        (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * cross
    )
    assert frechet(a, b) == pytest.approx(want.item(), rel=1e-6)


def test_frechet_computes_in_float64():
    a = cloud(100, 8, 7).float() + 1000  # float32 covariances would lose most digits here
    b = cloud(100, 8, 8).float() + 1000
    assert frechet(a, b) == pytest.approx(frechet(a.double() - 1000, b.double() - 1000), rel=1e-6)


def test_bias_law_of_identical_gaussians():
    d, g = 64, torch.Generator().manual_seed(0)
    for n in (500, 1000, 2000, 4000, 8000):
        mean = np.mean([frechet(*torch.randn(2, n, d, generator=g)) for _ in range(4)])
        assert mean == pytest.approx(bias(d, n), rel=0.1) and bias(d, n) == d * d / (2 * n) + 2 * d / n


# ---- statistics of a stream (ACCEPTANCE E2)


def close(a, b, rel=1e-10):
    return (torch.as_tensor(a) - torch.as_tensor(b)).norm() <= rel * torch.as_tensor(b).norm()


@pytest.mark.parametrize("away", [0.0, 1e3])
def test_any_batches_in_any_order_give_the_two_pass_result(away):
    x = cloud(1003, 24, 1) + away
    for sizes in ([1003], [1] * 1003, [500, 3, 500], [7] * 143 + [2]):
        parts = [Stats().add(p) for p in x.split(sizes)]
        whole = Stats()
        for p in parts[::-1]:
            whole.merge(p)
        assert whole.n == 1003 and close(whole.mean, x.mean(0)) and close(whole.cov, np.cov(x.numpy().T))
    assert Stats().merge(Stats()).n == 0 and close(
        Stats().merge(Stats().add(x)).merge(Stats()).cov, np.cov(x.numpy().T)
    )


SHARES = """
import sys, torch
from sdcourse.engine.dist import join
from sdcourse.evaluation.stats import Stats, save_stats
ranks = join("cpu")
x = torch.randn(101, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
mine = x[ranks.rank::ranks.world][:0 if ranks.rank == 2 else None]
whole = Stats({"extractor": "demo"}).add(mine).over(ranks)
save_stats(whole, f"{sys.argv[1]}/{ranks.world}-{ranks.rank}.npz")
"""


def test_ranks_see_the_same_whole(tmp_path):
    "Two ranks with uneven shares; all of them hold the statistics of everything."
    for world in (1, 2):
        ends = ranks.finish(ranks.start(["-c", SHARES, tmp_path], world))
        assert [c for c, _, _ in ends] == [0] * world, ends
    one, a, b = (load_stats(tmp_path / f"{n}.npz") for n in ("1-0", "2-0", "2-1"))
    assert (
        one.n == a.n == b.n == 101
        and close(a.cov, one.cov)
        and torch.equal(a.cov, b.cov)
        and a.how == {"extractor": "demo"}
    )


def test_pytorch_fid_reads_our_file_and_we_read_its(tmp_path):
    from pytorch_fid import fid_score

    x, y = cloud(300, 16, 1), cloud(200, 16, 2)
    save_stats(Stats({"resize": "pil"}).add(x), tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as f:
        mu, sigma = f["mu"], f["sigma"]
    assert np.array_equal(mu, Stats().add(x).mean.numpy()) and sigma.dtype == np.float64
    np.savez_compressed(
        tmp_path / "theirs.npz", mu=y.mean(0).numpy(), sigma=np.cov(y.numpy(), rowvar=False)
    )  # as its save_fid_stats does
    ours, theirs = load_stats(tmp_path / "ours.npz"), load_stats(tmp_path / "theirs.npz")
    assert (ours.n, ours.how, theirs.n, theirs.how) == (300, {"resize": "pil"}, 0, {})
    want = fid_score.calculate_frechet_distance(mu, sigma, theirs.mean.numpy(), theirs.cov.numpy())
    assert frechet(ours, theirs) == pytest.approx(want, rel=1e-6) and frechet(x, y) == pytest.approx(
        want, rel=1e-6
    )


def test_what_is_no_statistics_is_refused(tmp_path):
    def refused(words, fn):
        with pytest.raises(UserError, match=words) as e:
            fn()
        assert "\n" not in str(e.value)

    path = tmp_path / "x.npz"
    refused("no such file", lambda: load_stats(path))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hit"), "w"))

    for arrays, words in (
        (dict(a=np.eye(2)), "expected arrays mu and sigma"),
        (dict(mu=np.zeros(2), sigma=np.eye(3)), "do not go together"),
        (dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "not finite"),
        (dict(mu=np.array([Evil()], dtype=object), sigma=np.eye(1)), "expected arrays mu and sigma"),
    ):
        np.savez(path, **arrays)
        refused(words, lambda: load_stats(path))
    assert not (tmp_path / "hit").exists()
    path.write_bytes(b"PK\x03\x04 half a zip")
    refused("holds no statistics", lambda: load_stats(path))
    refused("end in .npz", lambda: save_stats(Stats().add(torch.randn(3, 2)), tmp_path / "x.json"))
    refused(
        "1 images have no covariance",
        lambda: save_stats(Stats().add(torch.randn(1, 2)), tmp_path / "one.npz"),
    )
    refused(
        "2 of 3 features are not finite",
        lambda: Stats().add(torch.tensor([[1.0], [float("nan")], [float("inf")]])),
    )
    refused(r"features are \[n,d\]", lambda: Stats().add(torch.zeros(2, 3, 4)))
    refused(
        "another extractor .inception and tiny.",
        lambda: frechet(
            Stats({"extractor": "inception"}).add(torch.randn(9, 2)),
            Stats({"extractor": "tiny"}).add(torch.randn(9, 2)),
        ),
    )
    refused("features of 2 and of 3 numbers", lambda: frechet(torch.randn(9, 2), torch.randn(9, 3)))
    refused("do not go with", lambda: Stats().add(torch.randn(9, 2)).merge(Stats().add(torch.randn(9, 3))))
    assert not (tmp_path / "one.npz").exists() and not (tmp_path / "x.json").exists()
