"""D11: each batch has one shape, no item is lost, nothing is enlarged beyond the limit; on two ranks, too."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sdcourse.core import UserError
from sdcourse.data.buckets import Bucketed, bucket_of, bucket_sizes, fitted
from sdcourse.dataset import pictures
from sdcourse.engine.order import BucketOrder, Order, Plan, micro_rows, order_of, rank_rows

SHAPES = [
    (64, 64),
    (96, 64),
    (128, 64),
    (64, 100),
    (70, 140),
    (64, 64),
    (200, 100),
    (65, 64),
    (100, 70),
    (64, 128),
    (90, 90),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Eleven pictures of many shapes, with captions."
    home = tmp_path_factory.mktemp("d") / "data"
    (home / "train").mkdir(parents=True)
    rows = []
    for i, size in enumerate(SHAPES):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))
        exif = Image.Exif()
        if i == 4:
            exif[0x0112], image = 6, image.transpose(Image.Transpose.ROTATE_90)  # stored lying on its side
        image.save(home / f"train/{i:02}.jpg", quality=95, exif=exif)
        rows.append(json.dumps(dict(file_name=f"{i:02}.jpg", text=f"picture {i}")))
    (home / "train/metadata.jsonl").write_text("\n".join(rows) + "\n")
    return home


def test_sizes_have_the_area_and_the_ratio():
    for side, step, ratio in ((512, 64, 2.0), (64, 16, 2.5), (1024, 64, 3.0)):
        sizes = bucket_sizes(side, step=step, ratio=ratio)
        assert (side, side) in sizes and len(set(sizes)) == len(sizes) > 2
        for w, h in sizes:
            assert (
                w % step == h % step == 0
                and w * h <= side * side
                and max(w, h) <= ratio * min(w, h)
                and (h, w) in sizes
            )
        assert min(w * h for w, h in sizes) > 0.75 * side * side


def test_the_bucket_is_the_nearest_that_does_not_enlarge():
    sizes = bucket_sizes(64, step=16)
    for w, h in [(int(a), int(b)) for a, b in np.random.default_rng(0).integers(30, 300, (400, 2))]:
        for limit in (1.0, 1.5):
            k = bucket_of((w, h), sizes, upscale=limit)
            ok = [j for j, (a, b) in enumerate(sizes) if max(a / w, b / h) <= limit]
            if not ok:
                assert k == -1
            else:
                assert (
                    k in ok
                    and abs(np.log(w / h * sizes[k][1] / sizes[k][0]))
                    <= min(abs(np.log(w / h * sizes[j][1] / sizes[j][0])) for j in ok) + 1e-12
                )


def test_every_batch_is_of_one_bucket_and_no_item_is_lost(data):
    found = Bucketed(pictures(data), bucket_sizes(64, step=16, ratio=4.0))
    assert (
        len(set(found.groups.tolist())) >= 3 and found.sizes[found.groups[4]] == found.sizes[found.groups[9]]
    )  # the turned one is upright
    order, n, batch = order_of(found, 4, seed=3), len(found), 4
    assert isinstance(order, BucketOrder)
    cycles = []
    for cycle in range(2):
        seen = [order.items(s * batch, s * batch + batch) for s in range(cycle * n, cycle * n + n)]
        assert all(len(set(found.groups[i].tolist())) == 1 for i in seen)
        assert np.bincount(np.concatenate(seen), minlength=n).tolist() == [batch] * n
        cycles.append([i.tolist() for i in seen])
    assert cycles[0] != cycles[1]
    early = np.bincount(
        found.groups[np.concatenate([order.items(s * batch, s * batch + batch) for s in range(n // 2 + 1)])],
        minlength=len(found.sizes),
    )
    share = np.bincount(found.groups, minlength=len(found.sizes)) / n * batch * (n // 2 + 1)
    assert (np.abs(early - share) <= batch).all()  # never more than one batch ahead or behind


def test_ranks_and_micro_batches_share_a_batch():
    order = BucketOrder([0] * 5 + [1] * 4, 6, seed=0)

    def all_of(world, micro, start=0):
        plans = [
            list(Plan(order, 6, tuple(micro_rows(rank_rows(6, r, world), micro)), start, 20, positions=True))
            for r in range(world)
        ]
        per = len(plans[0]) // (20 - start)
        return [[x for p in plans for m in p[s * per : (s + 1) * per] for x in m] for s in range(20 - start)]

    assert all_of(1, 0) == all_of(2, 0) == all_of(3, 1) and all_of(1, 0)[7:] == all_of(2, 0, start=7)
    assert isinstance(order_of(range(5), 2, 0), Order)
    with pytest.raises(ValueError, match="two steps"):
        order.items(4, 8)


def test_pictures_have_the_shape_of_their_bucket(data):
    found = Bucketed(pictures(data), bucket_sizes(64, step=16, ratio=4.0), crop="random", seed=1)
    for g in set(found.groups.tolist()):
        rows = np.flatnonzero(found.groups == g).tolist()
        batch = found.__getitems__([(i, 7 + i) for i in rows])
        w, h = found.sizes[g]
        assert batch["image"].shape == (len(rows), 3, h, w) and batch["id"] == [found.ids[i] for i in rows]
    wide = next(i for i, s in enumerate(SHAPES) if s == (100, 70))
    a, b, *more = (found.__getitems__([(wide, p)])["image"] for p in (0, 0, *range(1, 9)))
    assert torch.equal(a, b) and not all(torch.equal(a, c) for c in more)


def test_a_crop_is_a_part_of_the_picture():
    x = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    got = fitted(Image.fromarray(x), (80, 64), (0.5, 0.0))
    assert np.array_equal(got.permute(1, 2, 0).numpy(), x[:, 8:88])


def test_too_small_is_said(data):
    with pytest.raises(
        UserError, match="00 and 10 more pictures: 64 x 64 pixels are too small for every bucket"
    ):
        Bucketed(pictures(data), bucket_sizes(256))
    assert len(Bucketed(pictures(data), bucket_sizes(128, step=32), upscale=3.0)) == 11


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("column, mean", [("", (255, 0, 0)), ("target", (0, 0, 255))])
def test_the_column_of_pictures_reaches_the_training(tmp_path, built, buckets, column, mean):
    "faults.md C: each row names a red and a blue picture."
    import tiny_models
    from sdcourse.config import resolve
    from sdcourse.train import sd15

    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for colour in ("red", "blue"):
            Image.new("RGB", (32, 32), colour).save(tmp_path / split / f"{colour}.png")
        row = dict(file_name="red.png", target="blue.png", text="a cat")
        (tmp_path / split / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    how = dict(model=str(built(tiny_models.thin_sd15)), data=str(tmp_path), image_size=32, flip=False)
    how |= dict(buckets=buckets, image_column=column) | (dict(bucket_step=8) if buckets else {})
    task = sd15.Task(resolve(sd15.Config, overrides=how))
    task.check()
    for split in ("train", "validate"):
        seen = task.dataset(split).__getitems__([(0, 0)])["image"].float()
        assert seen.mean((0, 2, 3)).tolist() == list(mean)


def test_it_trains(tmp_path, data, built):
    from sdcourse.config import resolve
    from sdcourse.engine.loop import train
    import tiny_models
    from sdcourse.train import sd15

    model = built(tiny_models.thin_sd15)
    over = dict(
        model=str(model),
        data=str(data),
        image_size=64,
        buckets=True,
        bucket_step=16,
        crop="random",
        max_steps=6,
        batch_size=4,
        micro_batch=3,
        encode_batch=4,
        checkpoint_every=0,
        num_samples=0,
        num_inference_steps=2,
        validation_prompts=("x",),
    )
    task = sd15.Task(resolve(sd15.Config, preset="tiny", overrides=over | dict(out=str(tmp_path / "run"))))
    assert train(task).step == 6
    with pytest.raises(UserError, match="no multiple of 8"):
        sd15.Task(resolve(sd15.Config, overrides=over | dict(bucket_step=4))).check()
    with pytest.raises(UserError, match="many shapes"):
        sd15.Task(resolve(sd15.Config, overrides=over | dict(latents="x"))).check()


SETTINGS = dict(  # faults.md F; all of the UNet is trained on two ranks in test_sd15
    adapters=dict(lora_rank=2, lora_alpha=8.0, lora_text=True, micro_batch=2, buckets=True, bucket_step=8),
    text=dict(train_text=True, gradient_checkpointing=True, micro_batch=1, buckets=True, bucket_step=8),
)
TRAIN = """
import json, sys
import torch
torch.set_num_threads(1)
from sdcourse.config import resolve
from sdcourse.engine.loop import train
from sdcourse.train import sd15
sd15.Task.flops = lambda self, module: 1. # what is the same in all is left out
sd15.Task.sample = lambda self, module, path: None
home, settings = json.loads(sys.argv[1])
for name, over in settings.items():
    train(sd15.Task(resolve(sd15.Config, preset='tiny', overrides=over | dict(out=f'{home}/{name}'))))
"""


def test_two_ranks_train_buckets_adapters_and_words_as_one(tmp_path, data, built):
    "O2 in float64: the same pictures of one bucket in each step, the same weights and averages."
    import ranks
    import tiny_models
    import warm
    from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint
    from sdcourse.engine.trackers import read_metrics

    how = dict(model=str(built(tiny_models.thin_sd15)), data=str(data), image_size=32, precision="fp64")
    how |= dict(batch_size=6, max_steps=2, lr=1e-3, flip=True, num_workers=0, checkpoint_every=0, log_every=1)
    how |= dict(
        cond_drop=0.5, encode_batch=1
    )  # the VAE stays in float32, and its last bits depend on its batch
    settings = {name: how | over for name, over in SETTINGS.items()}
    first = warm.MODELS + "import peft"
    for n in (1, 2):
        argv = ["-c", TRAIN, json.dumps([str(tmp_path / str(n)), settings])]
        started = [warm.start(argv, first=first)] if n == 1 else ranks.start(argv, 2, first=first)
        ends = ranks.finish(started, warm.LONG)
        assert [code for code, _, _ in ends] == [0] * n, ends[0][2][-3000:]
    for name in settings:
        runs = [tmp_path / str(n) / name for n in (1, 2)]
        one, two = (load_checkpoint(latest_checkpoint(r / "checkpoints")[0])["tensors"] for r in runs)
        assert one["model"].keys() == two["model"].keys()
        for kind in ("model", "ema"):
            assert max((one[kind][k] - x).abs().max().item() for k, x in two[kind].items()) <= 1e-9
        losses = [[row["loss"] for row in read_metrics(r) if "loss" in row] for r in runs]
        assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-9)
