"""E7: whatever changes the size of a picture gives what Pillow gives (bicubic), and PNG loses nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from sdcourse.commands.copy_images import CopyOptions, copy_images
from sdcourse.data.buckets import fitted
from sdcourse.data.images import image_bytes, open_image, shrink
from sdcourse.dataset import Transform, pictures
from sdcourse.evaluation.judges import Tiny

# width and height: smaller, larger, one pixel off, odd, thin, and as it is; all go to squares of 32
SIZES = [(16, 16), (200, 200), (31, 31), (33, 33), (48, 24), (97, 61), (300, 5), (3, 512), (1, 257), (32, 32)]
KINDS = ("noise", "edges", "slope")


def picture(size, kind):
    "Noise of all levels, black and white edges, where a filter overshoots most, or a slope."
    width, height = size
    rng = np.random.default_rng(width)
    if kind == "noise":
        pixels = rng.integers(0, 256, (height, width, 3))
    elif kind == "edges":
        pixels = rng.integers(0, 2, (height, width, 3)) * 255
    else:
        pixels = (np.arange(width)[:, None] * 7 + np.arange(height)[:, None, None] * [3, 5, 11]) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def tensor(im):
    return torch.from_numpy(np.array(im)).permute(2, 0, 1)


def off(found, want):
    "The largest difference, in levels of 255."
    want = tensor(want) if isinstance(want, Image.Image) else want
    assert found.shape == want.shape
    return (found.double() - want.double()).abs().max().item()


@pytest.fixture(scope="module")
def net():
    return Tiny("tiny-scenes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_resize_is_that_of_pillow(size, kind, net):
    im = picture(size, kind)
    width, height = size
    squashed = im.resize((32, 32), Image.Resampling.BICUBIC)
    assert (
        off((net.pixels(tensor(im)[None])[0] + 1) * 127.5, squashed) < 1.01
    )  # float32 adds its own hundredth
    assert off(Transform(32, "none")(im), squashed) == 0
    scale = 32 / min(size)
    whole = [max(32, round(n * scale)) for n in size]
    middle = [(n - 32) // 2 for n in whole]
    box = (*middle, middle[0] + 32, middle[1] + 32)
    cut = im.resize(whole, Image.Resampling.BICUBIC).crop(box)
    assert off(Transform(32)(im), cut) == 0
    tall = fitted(im, (32, 48))
    scale = max(32 / width, 48 / height)
    now = [max(b, round(n * scale)) for n, b in zip(size, (32, 48))]
    left, top = (int(0.5 * (n - b + 1)) for n, b in zip(now, (32, 48)))
    want = im.resize(now, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 48))
    assert off(tall, want) == 0
    small = shrink(im, 16)
    least = min(16, *size)
    assert min(small.size) == least
    rest = [max(1, round(n * least / min(size))) for n in size]
    assert off(tensor(small), im.resize(rest, Image.Resampling.BICUBIC)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_holds_every_level_of_every_size(tmp_path, kind):
    "Encoded, copied, and read by the view that all readers use."
    made = {f"{w}x{h}": picture((w, h), kind) for w, h in SIZES}
    for im in made.values():
        assert off(tensor(open_image(image_bytes(im))), im) == 0
    home = tmp_path / "data/train"
    home.mkdir(parents=True)
    for name, im in made.items():
        im.save(home / f"{name}.png")
    assert copy_images(tmp_path / "data", tmp_path / "copy", CopyOptions(split="train")) == 0
    for folder in ("data", "copy"):
        found = pictures(tmp_path / folder)
        assert sorted(found.ids) == sorted(made)
        assert all(off(tensor(found.image(i)), made[name]) == 0 for i, name in enumerate(found.ids))
