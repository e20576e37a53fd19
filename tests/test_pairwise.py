"""PSNR, SSIM and LPIPS against the libraries that define them; identical pairs and rising noise (ACCEPTANCE
E9).
"""

import math

import numpy as np
import pytest
import torch

import sdcourse  # noqa: F401  (before lpips, which imports torchvision)
from sdcourse.core import UserError
from sdcourse.evaluation.pairwise import TRUNKS, Lpips, diversity, psnr, ssim


def smooth(n=4, size=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.nn.functional.interpolate(
        255 * torch.rand(n, 3, 6, 6, generator=g), size=(size, size), mode="bicubic", align_corners=False
    ).clamp(0, 255)


def noisy(x, s):
    return (x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255).byte()


def state_of(trunk):
    "torchvision's own network with random weights: the published ones cannot be fetched here."
    import torchvision.models as tv

    torch.manual_seed(0)
    return {"alex": tv.alexnet, "vgg": tv.vgg16, "squeeze": tv.squeezenet1_1}[trunk](
        weights=None
    ).state_dict()


@pytest.fixture(scope="module")
def alex():
    return Lpips("alex", state_of("alex"), name="LPIPS[random alex]")


def test_psnr_and_ssim_by_hand():
    a, b = smooth(2).byte(), noisy(smooth(2), 12)
    x, y = a.double().numpy() / 255, b.double().numpy() / 255
    for k in range(2):
        assert psnr(a, b)[k].item() == pytest.approx(
            10 * math.log10(1 / ((x[k] - y[k]) ** 2).mean()), rel=1e-12
        )
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2

    def at(p, q, i, j):
        p, q = p[i : i + 11, j : j + 11], q[i : i + 11, j : j + 11]
        m, n = (window * p).sum(), (window * q).sum()
        v, w, c = (
            (window * (p - m) ** 2).sum(),
            (window * (q - n) ** 2).sum(),
            (window * (p - m) * (q - n)).sum(),
        )
        return (2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4))

    small = [z[:1, :, :16, :14] for z in (a, b)]
    want = np.mean([at(x[0, c], y[0, c], i, j) for c in range(3) for i in range(6) for j in range(4)])
    assert ssim(*small).item() == pytest.approx(want, rel=1e-9)


def test_ssim_is_scikit_images():
    from skimage import metrics

    a, b = smooth(1).byte(), noisy(smooth(1), 12)
    want = metrics.structural_similarity(
        a[0].numpy(),
        b[0].numpy(),
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
    )
    assert ssim(a, b).item() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_lpips_is_the_librarys_with_these_weights(trunk, monkeypatch):
    import lpips
    from torchvision import models as tv

    state = state_of(trunk)
    make = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[trunk]
    real = getattr(tv, make)

    def loaded(pretrained=False, **k):
        net = real(weights=None)
        net.load_state_dict(state)
        return net

    monkeypatch.setattr(tv, make, loaded)
    theirs = lpips.LPIPS(net=trunk, verbose=False).eval()
    monkeypatch.undo()
    a, b = smooth(2).byte(), noisy(smooth(2), 30)
    with torch.no_grad():
        want = theirs(a.float() / 127.5 - 1, b.float() / 127.5 - 1).flatten()
    got = Lpips(trunk, state, name="x")(a, b)
    assert torch.allclose(got.float(), want, rtol=1e-5, atol=1e-7) and (got > 1e-4).all()


def test_identical_pairs_are_zero_and_noise_is_monotone(alex):
    "E9"
    x = smooth()
    levels = [noisy(x, s) for s in (3, 10, 30, 90)]
    assert (
        alex(x.byte(), x.byte()).tolist() == [0.0] * 4
        and ssim(x.byte(), x.byte()).tolist() == [1.0] * 4
        and psnr(x.byte(), x.byte()).isinf().all()
    )
    for fn, sign in ((alex, 1), (ssim, -1), (psnr, -1)):
        found = torch.stack([fn(x.byte(), y) for y in levels]) * sign
        assert (found.diff(dim=0) > 0).all(), fn


def test_lpips_is_symmetric_and_does_not_depend_on_the_batch(alex):
    a, b = smooth().byte(), noisy(smooth(), 20)
    assert torch.allclose(alex(a, b), alex(b, a)) and torch.allclose(
        alex(a, b), torch.cat([alex(a[i : i + 1], b[i : i + 1]) for i in range(4)]), rtol=1e-5
    )


def test_variety_compares_each_pair_once():
    seen = []

    def distance(a, b):
        seen.extend(zip(a[:, 0, 0, 0].tolist(), b[:, 0, 0, 0].tolist()))
        return torch.zeros(len(a)).double()

    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 4)
    diversity(distance, images)
    assert sorted(seen) == [(i, j) for i in range(6) for j in range(i + 1, 6)]
    assert len(diversity(distance, images, pairs=4)) == 4


def test_what_cannot_be_compared_is_one_line(alex, tmp_path, monkeypatch):
    def refused(words, fn):
        with pytest.raises(UserError, match=words) as e:
            fn()
        assert "\n" not in str(e.value)

    a = smooth().byte()
    refused("are no pairs", lambda: alex(a, a[:2]))
    refused("expected uint8", lambda: psnr(a.float(), a))
    refused("10 x 64 pixels: SSIM needs 11", lambda: ssim(a[..., :10], a[..., :10]))
    refused("1 image has no variety", lambda: diversity(alex, a[:1]))
    refused("give alex, vgg, squeeze", lambda: Lpips("resnet"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    refused(f"checkpoints/{TRUNKS['alex']}: no such file; put torchvision's", lambda: Lpips("alex"))
    refused("does not fit torchvision's vgg", lambda: Lpips("vgg", state_of("alex")))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hit"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    refused("nothing is unpickled", lambda: Lpips("alex", tmp_path / "evil.pth"))
    assert not (tmp_path / "hit").exists()
