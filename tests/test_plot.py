"""Pictures: bytes, sheets, figures that show themselves once, films."""

import base64, io, subprocess, sys

import numpy as np
import pytest
import torch
from PIL import Image

from sdcourse.core import UserError
from sdcourse.plot import (
    COLORS,
    CYCLE,
    figure_png,
    image_grid,
    plot_curves,
    save_gif,
    show_images,
    show_points,
    to_uint8,
)


def test_bytes_are_rounded_and_clipped():
    assert to_uint8(torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)).flatten().tolist() == list(range(256))
    assert to_uint8(torch.tensor([-3.0, 0.0, 3.0]).reshape(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels) and torch.equal(to_uint8(pixels), pixels)
    assert torch.equal(to_uint8([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]), pixels)
    assert to_uint8([Image.new("L", (4, 2), 7)]).shape == (1, 1, 2, 4)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (8, 8), (2, 2, 8, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(UserError, match="1 or 3 channels"):
        to_uint8(torch.zeros(shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_holds_every_image_in_order(channels):
    images = torch.randint(
        256, (10, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    sheet = np.array(image_grid(images, ncols=4, pad=2)).reshape(3 * 34 + 2, 4 * 34 + 2, channels)
    assert (sheet[:2] == 255).all() and (sheet[:, 34:36] == 255).all()
    for i, image in enumerate(images):
        y, x = 2 + i // 4 * 34, 2 + i % 4 * 34
        assert (sheet[y : y + 32 : 4, x : x + 32 : 4] == image.permute(1, 2, 0).numpy()).all()
    assert image_grid(images[:2], ncols=8, pad=0, min_size=1).size == (16, 8)


def test_figures_come_back_closed_and_labelled():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    fig = show_images(torch.zeros(3, 1, 8, 8), ["a", "b", "c"], ncols=2, title="three")
    assert [ax.get_title() for ax in fig.axes][:3] == ["a", "b", "c"] and fig.get_suptitle() == "three"
    points = show_points({"p": torch.zeros(4, 2)}, marks={"truth": torch.ones(1, 2)}, lim=2)
    assert points.axes[0].get_xlim() == (-2, 2) and points.axes[0].get_xlabel()
    assert plt.get_fignums() == before


def test_curves_keep_their_colours():
    import matplotlib.pyplot as plt

    ax = plot_curves(
        {"other": ([1, 2], [3, 4]), "data": ([1, 2], [3, 4], [2, 3], [4, 5]), "third": ([1, 2], [1, 1])},
        "x (s)",
        "y (m)",
        "up",
        logy=True,
    )
    assert [line.get_color() for line in ax.get_lines()] == [CYCLE[1], COLORS["data"], CYCLE[2]]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(), ax.get_yscale()) == (
        "x (s)",
        "y (m)",
        "up",
        "log",
    )
    assert ax.get_legend() is not None and len(ax.collections) == 1
    assert plot_curves({"one": ([1], [1])}, "x", "y", ax=ax.figure.subplots()).get_legend() is None
    plt.close(ax.figure)


def test_shown_figures_are_small_and_true():
    import matplotlib.pyplot as plt

    ax = plot_curves(
        {f"c{i}": (torch.linspace(0, 1, 50), torch.linspace(0, i, 50)) for i in range(5)}, "x", "y", "title"
    )
    data, shown = figure_png(ax.figure)
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    full = io.BytesIO()
    ax.figure.savefig(full, format="png", dpi=140)
    error = np.abs(
        np.array(image.convert("RGB")).astype(int) - np.array(Image.open(full).convert("RGB")).astype(int)
    )
    assert (
        image.mode == "P" and len(data) < 0.8 * len(full.getvalue()) and error.mean() < 1 and error.max() < 30
    )
    assert shown == {"width": 550, "height": 320}
    plt.close(ax.figure)


def test_film_has_all_frames_and_is_written_whole(tmp_path):
    frames = [torch.full((4, 1, 8, 8), v) for v in (-1.0, 0.0, 1.0)]
    path = save_gif(frames, tmp_path / "a.gif", fps=5, hold=2.0)
    with Image.open(path) as im:
        durations = []
        for k in range(im.n_frames):
            im.seek(k)
            durations.append(im.info["duration"])
        assert durations == [200, 200, 2000] and im.info["loop"] == 0
    with pytest.raises(UserError, match="no frames"):
        save_gif([], tmp_path / "b.gif")
    with pytest.raises(Exception):
        save_gif([image_grid(frames[0]), "not a frame"], tmp_path / "c.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_import_is_light():
    code = """
import sys, sdcourse.plot, sdcourse.diffusion
print([m for m in ('matplotlib', 'diffusers', 'PIL', 'sklearn') if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
