"""Feature extractors against the libraries that define them: the same network with the same random weights
must give the same numbers.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import ranks
import tiny_models
from sdcourse.core import UserError
from sdcourse.dataset import pictures
from sdcourse.evaluation.features import FILE, Inception, Vision, features_of, hub_weights, stats_of
from sdcourse.evaluation.stats import frechet, frechet_gaussian


def photos(folder, n, size=80, seed=0, level=0):
    "Smooth random colours as PNG."
    rng = np.random.default_rng(seed)
    (folder / "train").mkdir(parents=True)
    for i in range(n):
        small = Image.fromarray((rng.integers(level, 256, (5, 5, 3))).astype(np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"train/{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def random_weights():
    "A state dict of pytorch-fid's network with random weights: the published ones cannot be fetched here."
    from pytorch_fid import inception

    torch.manual_seed(0)
    load, inception.load_state_dict_from_url = torch.nn.Module.load_state_dict, lambda *_, **__: {}
    fetch = inception.load_state_dict_from_url
    torch.nn.Module.load_state_dict = lambda self, state: None
    try:
        net = inception.fid_inception_v3()
    finally:
        torch.nn.Module.load_state_dict, inception.load_state_dict_from_url = load, fetch
    loud = lambda v: (
        torch.randn_like(v) * (2 / v[0].numel()) ** 0.5 if v.ndim == 4 else v.clone()
    )  # otherwise every layer makes the signal smaller
    return {k: loud(v) for k, v in net.state_dict().items()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return photos(root / "a", 20), photos(root / "b", 16, seed=1, level=60)


def theirs(state, folder, resize):
    "Activations by pytorch-fid's own functions."
    from pytorch_fid import fid_score, inception

    fetch, inception.load_state_dict_from_url = inception.load_state_dict_from_url, lambda *_, **__: state
    try:
        net = inception.InceptionV3([3], resize_input=resize).eval()
    finally:
        inception.load_state_dict_from_url = fetch
    return fid_score.get_activations(
        sorted((folder / "train").glob("*.png")), net, batch_size=7, dims=2048, device="cpu", num_workers=0
    )


def relative(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).norm().item() / torch.as_tensor(b).norm().item()


@pytest.mark.slow
def test_our_inception_is_pytorch_fids(random_weights, sets):
    "Statistics to 1e-6 (1e-5 with channels_last), the distance to 1e-5."
    from pytorch_fid import fid_score

    want = [theirs(random_weights, s, False) for s in sets]
    assert np.std(want[0], axis=0).max() > 1e-3  # the random network tells pictures apart
    for last, limit in ((False, 1e-6), (True, 1e-5)):
        net = Inception(random_weights, resize=False, channels_last=last)
        got = [stats_of(net, pictures(s), batch=8) for s in sets]
        for g, w in zip(got, want):
            assert (
                g.n == len(w)
                and relative(g.mean, w.mean(0)) < limit
                and relative(g.cov, np.cov(w, rowvar=False)) < limit
            )
    # 256 of the features: its matrix root of 2,048 takes half a minute
    # (tools/bench_evaluation.py compares the whole)
    few = [w[:, ::8] for w in want]
    fid = fid_score.calculate_frechet_distance(
        few[0].mean(0), np.cov(few[0], rowvar=False), few[1].mean(0), np.cov(few[1], rowvar=False)
    )
    assert frechet_gaussian(*(x for g in got for x in (g.mean[::8], g.cov[::8, ::8]))) == pytest.approx(
        fid, rel=1e-5
    )


@pytest.mark.slow
def test_its_resize_is_pytorch_fids(random_weights, sets):
    "At 299 pixels, on two pictures: the 299 x 299 comparison of many is a benchmark."
    net, few = Inception(random_weights, channels_last=False), pictures(sets[0], max_samples=2)
    got = torch.cat([f for _, f in features_of(net, few)])
    x = (
        torch.stack([torch.from_numpy(np.array(few.image(i))).permute(2, 0, 1) for i in range(2)]).float()
        / 255
    )
    big = torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)
    small = Inception(random_weights, resize=False, channels_last=False)
    with torch.no_grad():
        want = small.net(big)[0].flatten(1)
    assert (
        relative(got, want) < 1e-6
        and "299" in net.how["resize"]
        and small.how["resize"] == "none"
        and small.how["weights"] == net.how["weights"]
    )


def test_dinov2_and_clip_are_their_libraries(tmp_path, built):
    from transformers import AutoImageProcessor, Dinov2Model

    folder, data = built(tiny_models.tiny_dino), pictures(photos(tmp_path / "x", 5))
    net = Vision(folder)
    got = torch.cat([f for _, f in features_of(net, data, batch=2)])
    model, steps = (
        Dinov2Model.from_pretrained(folder).eval().requires_grad_(False),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    want = model(**steps(images=[data.image(i) for i in range(5)], return_tensors="pt")).pooler_output
    assert (got - want).abs().max() < 1e-4 and (net.name, net.width) == ("dinov2", want.shape[1])
    clip = Vision(tiny_models.tiny_clip(tmp_path / "clip"))
    assert clip.name == "clip" and clip.how["weights"] != net.how["weights"]
    with pytest.raises(UserError, match="another extractor"):
        frechet(stats_of(clip, data), stats_of(net, data))


class Colours:
    name, how = "colours", {"extractor": "colours"}

    def __call__(self, images):
        return images.float().flatten(2).mean(2)


SHARES = """
import sys
from sdcourse.dataset import pictures
from sdcourse.engine.dist import join
from sdcourse.evaluation.features import stats_of
from sdcourse.evaluation.stats import save_stats
sys.path[:0] = {path!r}
from test_features import Colours
ranks = join("cpu")
found = stats_of(Colours(), pictures(sys.argv[1]), ranks=ranks, batch=3)
save_stats(found, f"{{sys.argv[2]}}/{{ranks.world}}-{{ranks.rank}}.npz")
"""


def test_any_batch_and_number_of_ranks_see_the_same_set(sets, tmp_path):
    from pathlib import Path
    from sdcourse.evaluation.stats import load_stats

    whole = stats_of(Colours(), pictures(sets[0]))
    assert relative(stats_of(Colours(), pictures(sets[0]), batch=1).cov, whole.cov) < 1e-10
    code = SHARES.format(path=[str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    ends = ranks.finish(ranks.start(["-c", code, sets[0], tmp_path], 2))
    assert [c for c, _, _ in ends] == [0, 0], ends
    for r in (0, 1):
        found = load_stats(tmp_path / f"2-{r}.npz")
        assert (
            found.n == 20
            and relative(found.cov, whole.cov) < 1e-10
            and relative(found.mean, whole.mean) < 1e-10
        )


def test_what_cannot_be_measured_is_said_in_one_line(random_weights, sets, tmp_path, monkeypatch):
    def refused(words, fn):
        with pytest.raises(UserError, match=words) as e:
            fn()
        assert "\n" not in str(e.value)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    refused(f"hub/checkpoints/{FILE}: no such file; put pytorch-fid's {FILE}", Inception)
    (tmp_path / FILE).write_bytes(b"other")
    refused("is not the file that its name says", lambda: hub_weights(FILE, tmp_path / FILE))

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hit"), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    refused("holds no weights .*nothing is unpickled", lambda: Inception(tmp_path / "evil.pth"))
    assert not (tmp_path / "hit").exists()
    torch.save({"x": torch.zeros(1)}, tmp_path / "wrong.pth")
    refused("does not fit pytorch-fid's InceptionV3", lambda: Inception(tmp_path / "wrong.pth"))
    mixed = photos(tmp_path / "mixed", 3)
    Image.new("RGB", (40, 60)).save(mixed / "train/odd.png")
    refused("odd.png: is 40 x 60 pixels and others are 80 x 80", lambda: stats_of(Colours(), pictures(mixed)))
    (mixed / "train/odd.png").write_bytes((mixed / "train/000.png").read_bytes()[:-50])
    refused("truncated.*odd.png", lambda: stats_of(Colours(), pictures(mixed)))
    (mixed / "train/odd.png").write_text("no picture")
    refused("unreadable.*odd.png", lambda: stats_of(Colours(), pictures(mixed)))
    net = Inception.__new__(Inception)
    refused(
        r"expected uint8 \[b,3,h,w\], got torch.float32",
        lambda: Inception.__call__(net, torch.zeros(1, 3, 8, 8)),
    )
    refused("no pictures", lambda: pictures((tmp_path / "empty").mkdir() or tmp_path / "empty"))


def test_weights_come_from_the_file_that_is_named(random_weights, tmp_path):
    torch.save(random_weights, tmp_path / "mine.pth")
    assert Inception(tmp_path / "mine.pth").how == Inception(random_weights).how
    other = random_weights | {"fc.bias": random_weights["fc.bias"] + 1}
    assert Inception(other).how["weights"] != Inception(random_weights).how["weights"]
