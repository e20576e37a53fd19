"""`--weights FILE`: each training item is drawn as often as it weighs, by id; exact on resume, for any number
of ranks.
"""

import json
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest

import toy
import sdcourse.engine.loop as loop
from hostile import picture
from sdcourse.config import resolve
from sdcourse.core import UserError, write_json
from sdcourse.data import shards as sh
from sdcourse.data.sampling_weights import SamplingWeights
from sdcourse.engine.order import Order, Plan, micro_rows, order_of, rank_rows
from sdcourse.train import sd15
from sdcourse.train.flow_dit import Config, Task
from test_flow_dit import latents_folder
from test_resume import outcome, same, watched

N, FIRST = 50, 100  # items of the toy set, and its first id


def weight(i):
    return 3.0 if i % 7 == 0 else 0.5


def table(path, ids=range(FIRST, FIRST + N), **more):
    "Weights that follow the id, in another order than the items."
    write_json(path, {"weights": {str(i): weight(i) for i in reversed(ids)} | more})
    return path


@dataclass
class WeightedConfig(toy.ToyConfig):
    weights: str = ""


class Weighted(toy.ToyTask):
    "The toy with what flow_dit and sd15 do."

    @cached_property
    def weights(self):
        return SamplingWeights(self.config.weights) if self.config.weights else None

    def fixed(self):
        return {"weights_sha256": self.weights.sha256} if self.weights else {}

    def dataset(self, split):
        data = super().dataset(split)
        if split == "train" and self.weights:
            data.weights = self.weights.of(data.ids)
        return data


def run(out, weights, **over):
    cfg = WeightedConfig(
        **vars(toy.config(out, batch_size=10, max_steps=15)) | dict(weights=str(weights)) | over
    )
    return loop.train(Weighted(cfg))


# ---- what is drawn
def test_three_epochs_hold_each_item_as_often_as_it_weighs(tmp_path):
    with watched() as steps:
        run(tmp_path / "run", table(tmp_path / "w.json"))
    ids = np.concatenate(steps) - FIRST
    assert len(ids) == 3 * N
    w = np.array([weight(i) for i in range(FIRST, FIRST + N)])
    due = N * w / w.sum()
    for epoch in range(3):
        counts = np.bincount(ids[epoch * N : (epoch + 1) * N], minlength=N)
        assert (counts >= np.floor(due)).all() and (counts <= np.ceil(due)).all() and counts.sum() == N


def test_the_scale_does_not_matter_and_equal_weights_are_a_permutation(tmp_path):
    for factor in (1, 1e-90, 1e90):
        write_json(tmp_path / "w.json", {str(i): factor * weight(i) for i in range(50)})
        order = Order(50, 0, SamplingWeights(tmp_path / "w.json").of(range(50)))
        for epoch in range(3):
            found = Counter(order.items(50 * epoch, 50 * epoch + 50).tolist())
            assert all(found[i] in ((3, 4) if i % 7 == 0 else (0, 1)) for i in range(50)), factor
    assert sorted(Order(50, 0, (2.0,) * 50).items(0, 50)) == list(range(50))


def test_any_number_of_ranks_draws_the_same():
    order = Order(30, 0, tuple(map(weight, range(30))))

    def ids(world, micro):
        plans = [
            Plan(order, 8, tuple(micro_rows(rank_rows(8, r, world), micro)), 0, 12) for r in range(world)
        ]
        return np.concatenate([np.concatenate(list(p)).reshape(12, -1) for p in plans], axis=1).tolist()

    assert ids(1, 0) == ids(2, 3) == ids(5, 1)


# ---- every kind of data
def flow_dit(**over):
    return Task(resolve(Config, overrides=dict(size="tiny/4", device="cpu") | over))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Nine captioned pictures, as a folder and as tars."
    home = tmp_path_factory.mktemp("weights")
    (home / "data/train").mkdir(parents=True)
    for i in range(9):
        (home / "data/train" / f"{i}.png").write_bytes(picture(48, 40, seed=i, format="PNG"))
    lines = [json.dumps({"file_name": f"{i}.png", "id": f"p{i}", "text": f"picture {i}"}) for i in range(9)]
    (home / "data/train/metadata.jsonl").write_text("\n".join(lines) + "\n")
    flag = type("Never", (), {"raised": lambda self: False})()
    assert sh.pack(home / "data", home / "tars", sh.Shards(), flag=flag) == 0
    write_json(home / "w.json", {f"p{i}": i + 1 for i in reversed(range(9))} | {"of val": 1})
    return home


@pytest.mark.parametrize("kind", ["data", "tars"])
def test_pictures_and_tars(folder, kind, caplog):
    task = flow_dit(data=str(folder / kind), vae="tiny-vae", image_size=32, weights=str(folder / "w.json"))
    with caplog.at_level("INFO", "sdcourse"):
        task.check()
    assert [r.message.split(": ")[1] for r in caplog.records] == [
        "1 of its 10 ids are no training items and not used"
    ]
    data = task.dataset("train")
    assert dict(zip(data.ids, order_of(data, 8, 0).weights)) == {f"p{i}": i + 1.0 for i in range(9)}


def test_caches(tmp_path):
    write_json(tmp_path / "w.json", {f"item{i:02}": i + 1 for i in reversed(range(24))})
    task = flow_dit(data=str(latents_folder(tmp_path / "z")), weights=str(tmp_path / "w.json"))
    task.check()
    assert order_of(task.dataset("train"), 8, 0).weights == tuple(i + 1.0 for i in range(24))


def captioned(folder, **over):
    options = dict(data=str(folder / "data"), image_size=32, flip=False, weights=str(folder / "w.json"))
    return sd15.Task(resolve(sd15.Config, preset="tiny", overrides=options | over))


def test_captioned_pictures(folder):
    task = captioned(folder)
    task.check()
    assert order_of(task.dataset("train"), 8, 0).weights == tuple(i + 1.0 for i in range(9))
    assert task.facts()["weights_sha256"] == SamplingWeights(folder / "w.json").sha256


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(buckets=True), "buckets have turns by the number"),
        (dict(data="scenes", flip=False), "is it the file of another data set"),
    ],
)
def test_what_weights_do_not_go_with(folder, over, words):
    with pytest.raises(UserError, match=words):
        captioned(folder, **over).check()


# ---- files that are refused
@pytest.mark.parametrize(
    "content, words",
    [
        (
            '{"a": 1, "b": 0}',
            "1 of 2 training items have no finite number above 0; "
            "the first is b with the weight 0; give each",
        ),
        ('{"a": 1}', "the first is b with no weight"),
        ('{"a": -1, "b": 0}', "2 of 2 .* first is a with the weight -1"),
        ('{"a": 1, "b": NaN}', "NaN is no number of JSON"),
        ('{"a": 1, "b": Infinity}', "Infinity is no number of JSON"),
        ('{"a": 1, "b": "2"}', 'weight "2"'),
        ('{"a": true, "b": 2}', "weight true"),
        ('{"a": 1, "b": [1]}', "the first is b"),
        ('{"a": 1, "b": 1e300}', "the first is b"),
        ('{"weights": {"c": 1}}', "the file of another data set"),
        ("[1, 2]", "holds no table of weights"),
        ("1", "holds no table"),
        ("{", "not valid JSON"),
        ("\xff", "first is a|not valid JSON|no table"),
    ],
)
def test_bad_files(tmp_path, content, words):
    (tmp_path / "w.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=words) as e:
        SamplingWeights(tmp_path / "w.json").of(["a", "b"])
    assert "\n" not in str(e.value) and str(e.value).startswith(f"--weights {tmp_path}")


def test_refused_before_anything_begins(tmp_path):
    for name in ("nowhere.json", "."):
        with pytest.raises(UserError, match="cannot be read"):
            flow_dit(weights=str(tmp_path / name)).check()
    digits = flow_dit().dataset("train").ids
    with pytest.raises(UserError, match="1 of 1,437 training items"):
        flow_dit(weights=str(table(tmp_path / "w.json", digits[1:]))).check()
    flow_dit(weights=str(table(tmp_path / "w.json", digits))).check()


def test_an_item_may_be_called_weights(tmp_path):
    write_json(tmp_path / "w.json", {"weights": 2, "other": 1})
    assert SamplingWeights(tmp_path / "w.json").of(["other", "weights"]) == (1, 2)


# ---- stop and go on
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A training of 15 steps with a checkpoint after each fourth."
    home = tmp_path_factory.mktemp("whole")
    run(home / "run", table(home / "w.json"), checkpoint_every=4, keep=9)
    return home


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_ends_with_the_same_weights(whole, tmp_path, workers):
    start = whole / "run/checkpoints/step-00000008"
    with watched() as steps:
        run(tmp_path / "run", whole / "w.json", resume=str(start), num_workers=workers)
    (a, b, _), (c, d, _) = outcome(whole / "run"), outcome(tmp_path / "run")
    assert len(steps) == 7 and same(a, c) and same(b, d)


def test_a_resume_with_other_weights_is_refused(whole, tmp_path):
    "Another file by its name, and another content by its SHA-256; --force goes on."

    def resume(weights, **over):
        return run(tmp_path / "run", weights, resume=str(whole / "run/checkpoints/step-00000008"), **over)

    with pytest.raises(UserError, match="weights: .*w.json -> .*v.json"):
        resume(table(tmp_path / "v.json"))
    with pytest.raises(UserError, match=r"weights: .*w.json -> \)"):
        resume("")
    before = (whole / "w.json").read_text()
    try:
        table(whole / "w.json", one_more=1)
        with pytest.raises(UserError, match=r"was trained with other weights_sha256: ") as e:
            resume(whole / "w.json")
        assert "\n" not in str(e.value) and not (tmp_path / "run/config.yaml").exists()
        assert resume(whole / "w.json", force=True).step == 15
    finally:
        (whole / "w.json").write_text(before)


def test_checkpoints_of_before_know_no_files(whole):
    "What an older version wrote has no entry; without weights it goes on."
    task = Weighted(WeightedConfig())
    loop._same_files({"state": {}}, task)
    with pytest.raises(UserError, match="other weights_sha256"):
        loop._same_files({"state": {"fixed": {"weights_sha256": "ab"}}}, task)


def test_the_file_is_remembered(tmp_path):
    ids = flow_dit().dataset("train").ids
    task = flow_dit(weights=str(table(tmp_path / "w.json", ids)))
    want = SamplingWeights(tmp_path / "w.json").sha256
    assert task.fixed()["sampling weights"] == want and task.facts()["weights_sha256"] == want
    (tmp_path / "w.json").unlink()
    assert task.fixed()["sampling weights"] == want  # of the bytes that were read
