"""`--weights FILE`: each training item is drawn as often as it weighs, by id; exact on resume, for any number of ranks."""
import json
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import sdcourse.train.loop as loop
from hostile import picture
from sdcourse.config import resolve
from sdcourse.core import UserError, write_json
from sdcourse.data import shards as sh
from sdcourse.data.sampling_weights import SamplingWeights
from sdcourse.train import sd15
from sdcourse.train.checkpoint import latest_checkpoint, load_checkpoint
from sdcourse.train.flow_dit import Config, Task
from sdcourse.train.order import Order, Plan, micro_rows, order_of, rank_rows
from test_flow_dit import latents_folder

N, BATCH = 512, 128 # items of the synthetic set, items of a step: four steps an epoch


def weight(i): return 3. if i % 7 == 0 else 0.5


def table(path, ids=range(N), **more):
    "Weights that follow the id, in another order than the items."
    write_json(path, {"weights": {str(i): weight(i) for i in reversed(ids)} | more})
    return path


def config(out, **over):
    small = dict(data="synthetic", latent=(1, 8), size="tiny/8", max_steps=12, batch_size=BATCH, warmup_steps=0, device="cpu", num_samples=0)
    return resolve(Config, overrides=dict(out=str(out), threads=1, ema_decay=0.9, **small | over))


@contextmanager
def watched():
    "The ids of the training items, as they come to the device."
    ids, place = [], loop.Run.place
    def seen(self, batch, data, items):
        if data is self.data: ids.extend(int(i) for i in batch["id"])
        return place(self, batch, data, items)
    loop.Run.place = seen
    try: yield ids
    finally: loop.Run.place = place


def tensors(out): return load_checkpoint(latest_checkpoint(out / "checkpoints")[0])["tensors"]


# ---- what is drawn
def test_three_epochs_hold_each_item_as_often_as_it_weighs(tmp_path):
    with watched() as ids: loop.train(Task(config(tmp_path / "run", weights=str(table(tmp_path / "w.json")))))
    assert len(ids) == 3 * N
    w = np.array([weight(i) for i in range(N)])
    due = N * w / w.sum()
    for epoch in range(3):
        counts = np.bincount(ids[epoch * N:(epoch + 1) * N], minlength=N)
        assert (counts >= np.floor(due)).all() and (counts <= np.ceil(due)).all() and counts.sum() == N
    assert abs(np.bincount(ids, minlength=N)[::7].sum() / (3 * N) - due[::7].sum() / N) < 0.01


def test_the_scale_does_not_matter_and_equal_weights_are_a_permutation(tmp_path):
    for factor in (1, 1e-90, 1e90):
        write_json(tmp_path / "w.json", {str(i): factor * weight(i) for i in range(50)})
        order = Order(50, 0, SamplingWeights(tmp_path / "w.json").of(range(50)))
        for epoch in range(3):
            found = Counter(order.items(50 * epoch, 50 * epoch + 50).tolist())
            assert all(found[i] in ((3, 4) if i % 7 == 0 else (0, 1)) for i in range(50)), factor
    assert sorted(Order(50, 0, (2.,) * 50).items(0, 50)) == list(range(50))


def test_any_number_of_ranks_draws_the_same():
    order = Order(30, 0, tuple(map(weight, range(30))))
    def ids(world, micro):
        plans = [Plan(order, 8, tuple(micro_rows(rank_rows(8, r, world), micro)), 0, 12) for r in range(world)]
        return np.concatenate([np.concatenate(list(p)).reshape(12, -1) for p in plans], axis=1).tolist()
    assert ids(1, 0) == ids(2, 3) == ids(5, 1)


# ---- every kind of data
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Nine captioned pictures, as a folder and as tars."
    home = tmp_path_factory.mktemp("weights")
    (home / "data/train").mkdir(parents=True)
    for i in range(9): (home / "data/train" / f"{i}.png").write_bytes(picture(48, 40, seed=i, format="PNG"))
    lines = [json.dumps({"file_name": f"{i}.png", "id": f"p{i}", "text": f"picture {i}"}) for i in range(9)]
    (home / "data/train/metadata.jsonl").write_text("\n".join(lines) + "\n")
    flag = type("Never", (), {"raised": lambda self: False})()
    assert sh.pack(home / "data", home / "tars", sh.Shards(), flag=flag) == 0
    write_json(home / "w.json", {f"p{i}": i + 1 for i in reversed(range(9))} | {"of val": 1})
    return home


@pytest.mark.parametrize("kind", ["data", "tars"])
def test_pictures_and_tars(folder, kind, caplog):
    task = Task(config("", data=str(folder / kind), vae="tiny-vae", image_size=32, weights=str(folder / "w.json")))
    with caplog.at_level("INFO", "sdcourse"): task.check()
    assert [r.message.split(": ")[1] for r in caplog.records] == ["1 of its 10 ids are no training items and not used"]
    data = task.dataset("train")
    assert dict(zip(data.ids, order_of(data, 8, 0).weights)) == {f"p{i}": i + 1. for i in range(9)}


def test_caches(tmp_path):
    write_json(tmp_path / "w.json", {f"item{i:02}": i + 1 for i in reversed(range(24))})
    task = Task(config("", data=str(latents_folder(tmp_path / "z")), weights=str(tmp_path / "w.json")))
    task.check()
    assert order_of(task.dataset("train"), 8, 0).weights == tuple(i + 1. for i in range(24))


def captioned(folder, **over):
    options = dict(data=str(folder / "data"), image_size=32, flip=False, weights=str(folder / "w.json"))
    return sd15.Task(resolve(sd15.Config, preset="tiny", overrides=options | over))


def test_captioned_pictures(folder):
    task = captioned(folder)
    task.check()
    assert order_of(task.dataset("train"), 8, 0).weights == tuple(i + 1. for i in range(9))
    assert task.facts()["weights_sha256"] == SamplingWeights(folder / "w.json").sha256


@pytest.mark.parametrize("over, words", [(dict(buckets=True), "buckets have turns by the number"), (dict(data="scenes"), "drawn in each step")])
def test_what_weights_do_not_go_with(folder, over, words):
    with pytest.raises(UserError, match=words): captioned(folder, **over).check()


# ---- files that are refused
@pytest.mark.parametrize("content, words", [
    ('{"a": 1, "b": 0}', "1 of 2 training items have no finite number above 0; the first is b with the weight 0; give each"),
    ('{"a": 1}', "the first is b with no weight"), ('{"a": -1, "b": NaN}', "2 of 2 .* first is a with the weight -1"),
    ('{"a": 1, "b": Infinity}', "weight Infinity"), ('{"a": 1, "b": "2"}', 'weight "2"'), ('{"a": true, "b": 2}', "weight true"),
    ('{"a": 1, "b": [1]}', "the first is b"), ('{"a": 1, "b": 1e300}', "the first is b"), ('{"weights": {"c": 1}}', "the file of another data set"),
    ("[1, 2]", "holds no table of weights"), ("1", "holds no table"), ("{", "not valid JSON"), ("\xff", "first is a|not valid JSON|no table")])
def test_bad_files(tmp_path, content, words):
    (tmp_path / "w.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=words) as e: SamplingWeights(tmp_path / "w.json").of(["a", "b"])
    assert "\n" not in str(e.value) and str(e.value).startswith(f"--weights {tmp_path}")


def test_no_file_is_refused_before_the_run_has_a_folder(tmp_path):
    for name in ("nowhere.json", "."):
        with pytest.raises(UserError, match="cannot be read"): loop.train(Task(config(tmp_path / "run", weights=str(tmp_path / name))))
    with pytest.raises(UserError, match="training items"):
        loop.train(Task(config(tmp_path / "run", weights=str(table(tmp_path / "w.json", range(N - 1))))))
    assert not (tmp_path / "run").exists()


def test_an_item_may_be_called_weights(tmp_path):
    write_json(tmp_path / "w.json", {"weights": 2, "other": 1})
    assert SamplingWeights(tmp_path / "w.json").of(["other", "weights"]) == (1, 2)


# ---- stop and go on
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A training of twelve steps with a checkpoint after each fifth."
    home = tmp_path_factory.mktemp("whole")
    loop.train(Task(config(home / "run", weights=str(table(home / "w.json")), checkpoint_every=5, keep=9)))
    return home


def test_a_resumed_run_ends_with_the_same_weights(whole, tmp_path):
    with watched() as ids:
        loop.train(Task(config(tmp_path / "run", weights=str(whole / "w.json"), resume=str(whole / "run/checkpoints/step-00000005"))))
    assert len(ids) == 7 * BATCH
    a, b = tensors(whole / "run"), tensors(tmp_path / "run")
    assert all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k]) and a.keys() == b.keys()


def test_a_resume_with_other_weights_is_refused(whole, tmp_path):
    "Another file by its name, and another content by its SHA-256; --force goes on."
    def resume(weights, **over):
        start = str(whole / "run/checkpoints/step-00000005")
        return loop.train(Task(config(tmp_path / "run", weights=weights, resume=start, max_steps=12, **over)))
    with pytest.raises(UserError, match="weights: .*w.json -> .*v.json"): resume(str(table(tmp_path / "v.json")))
    with pytest.raises(UserError, match=r"weights: .*w.json -> \)"): resume("")
    before = (whole / "w.json").read_text()
    try:
        table(whole / "w.json", one_more=1)
        with pytest.raises(UserError, match=r"other files \(weights_sha256 differs\)") as e: resume(str(whole / "w.json"))
        assert "\n" not in str(e.value) and not (tmp_path / "run/config.yaml").exists()
        assert resume(str(whole / "w.json"), force=True).step == 12
    finally: (whole / "w.json").write_text(before)


def test_the_file_is_remembered(whole):
    from yaml import safe_load
    facts = safe_load((whole / "run/config.yaml").read_text())["facts"]
    assert facts["weights_sha256"] == SamplingWeights(whole / "w.json").sha256
