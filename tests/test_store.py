"""The files of a cache: plans, shards, growth, and everything that must be refused."""

import json
import pickle

import numpy as np
import pytest
import torch

from sdcourse.cache.store import (
    FORMAT,
    Cache,
    Joined,
    extend_plan,
    missing,
    read_index,
    shard_plan,
    write_shard,
)
from sdcourse.core import UserError
from sdcourse.engine.work import alone

COLUMNS = {"x": {"dtype": "float32", "shape": [3]}}


def blank(**over):
    return {
        "format": FORMAT,
        "kind": "demo",
        "key": {},
        "facts": {},
        "columns": COLUMNS,
        "shards": [],
        "dropped": {},
    } | over


def value(row):
    return float(sum(map(ord, "".join(map(str, row)))))


def fill(folder, index, columns=("x",)):
    for s in missing(folder, index):
        write_shard(
            folder, s, {c: torch.tensor([[value(r)] * 3 for r in shard_plan(folder, s)]) for c in columns}
        )


def made(folder, ids, split="train", per_shard=4, **over):
    folder.mkdir(exist_ok=True)
    index = blank(**over)
    extend_plan(folder, index, {split: [[i] for i in ids]}, per_shard)
    fill(folder, index, tuple(index["columns"]))
    return folder


def test_each_row_comes_back_under_its_id_in_any_order(tmp_path):
    ids = [f"i{n}" for n in range(23)]
    data = Cache(made(tmp_path / "c", ids))
    assert data.ids.tolist() == ids and len(data) == 23
    order = np.random.default_rng(0).permutation(23)
    batch = data.__getitems__(order.tolist())
    assert batch["id"].tolist() == [ids[i] for i in order] and batch["x"][:, 0].tolist() == [
        value([ids[i]]) for i in order
    ]
    assert data[5]["id"] == "i5" and data[5]["x"][0] == value(["i5"])
    again = pickle.loads(pickle.dumps(data))  # a worker process opens its own files
    assert torch.equal(again.__getitems__([3, 22, 0])["x"], data.__getitems__([3, 22, 0])["x"])
    assert data.numbers(["i3", "nobody", "i22"]).tolist() == [3, -1, 22]


def test_growth_plans_only_what_is_new(tmp_path):
    index = blank()
    rows = [["a", 1], ["b", 1], ["c", 1]]
    assert extend_plan(tmp_path, index, {"train": rows}, 2) == 3
    fill(tmp_path, index)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name != "index.json"}
    assert extend_plan(tmp_path, index, {"train": rows}, 2) == 0 and not missing(tmp_path, index)
    assert extend_plan(tmp_path, index, {"train": [["a", 1], ["c", 2], ["d", 1]]}, 2) == 2
    assert [s["name"] for s in missing(tmp_path, index)] == ["train-00002"] and shard_plan(
        tmp_path, index["shards"][2]
    ) == [["c", 2], ["d", 1]]
    fill(tmp_path, index)
    data = Cache(tmp_path)
    assert sorted(data.ids) == ["a", "c", "d"] and data.__getitems__(data.numbers("c"))["x"][0, 0] == value(
        ["c", 2]
    ) != value(["c", 1])
    assert all((tmp_path / n).read_bytes() == b for n, b in before.items())
    assert (
        extend_plan(tmp_path, index, {"train": [["a", 1], ["b", 1], ["c", 1], ["d", 1]]}, 2) == 2
    )  # b comes back, c is what it was
    fill(tmp_path, index)
    data = Cache(tmp_path)
    assert sorted(data.ids) == ["a", "b", "c", "d"] and data.__getitems__(data.numbers("c"))["x"][
        0, 0
    ] == value(["c", 1])


def test_what_is_not_finished_or_not_a_cache_is_refused(tmp_path):
    def refused(words, **over):
        with pytest.raises(UserError, match=words):
            Cache(folder, **over)

    folder = made(tmp_path / "c", "abcdefgh")
    refused("has no split 'test'", split="test")
    refused("is a cache of demo, and latents are needed", kind="latents")
    shard = folder / "train-00001.safetensors"
    whole = shard.read_bytes()
    shard.unlink()
    refused("1 of 2 shards are missing")
    for broken in (b"", whole[:-5], whole[:20], b"x" * 100):
        shard.write_bytes(broken)
        with pytest.raises(UserError, match="train-00001.safetensors: cannot be read"):
            Cache(folder).__getitems__([7])
    shard.write_bytes((folder / "train-00000.safetensors").read_bytes())
    with pytest.raises(UserError, match="belongs to another plan"):
        Cache(folder).__getitems__([7])
    shard.write_bytes(whole)
    (folder / "train-00000.json").write_text('[["z"], ["b"], ["c"], ["d"]]')
    refused("train-00000.json: was changed")
    index = json.loads((folder / "index.json").read_text())
    for text, words in (
        (json.dumps(index | {"format": 0}), "is not the index of a cache"),
        ('{"tars": []}', "is not the index of a cache"),
        ("[", "not valid JSON"),
    ):
        (folder / "index.json").write_text(text)
        refused(words)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and no cache"):
        read_index(tmp_path / "other")
    with pytest.raises(UserError, match="is a file"):
        read_index(tmp_path / "other/mine.txt")
    with pytest.raises(UserError, match="no cache is there"):
        Cache(tmp_path / "nothing")


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    index = blank()
    extend_plan(tmp_path, index, {"train": [["a"]]}, 1)
    import safetensors.torch

    def broken(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(OSError):
        write_shard(tmp_path, index["shards"][0], {"x": torch.zeros(1, 3)})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "train-00000.json"]


def test_one_process_at_a_time_and_leftovers_go(tmp_path):
    with alone(tmp_path / "c"):
        (tmp_path / "c/.train-00000.safetensors.77.tmp").write_text("half")
        with pytest.raises(UserError, match="another process is working in it"):
            with alone(tmp_path / "c"):
                pass
    with alone(tmp_path / "c"):
        assert [p.name for p in (tmp_path / "c").iterdir()] == [".owner.json"]


def test_joined_sets_give_one_item_and_notice_strangers(tmp_path):
    columns = lambda name: {name: {"dtype": "float32", "shape": [3]}}
    one, two = (
        Cache(made(tmp_path / "one", "abcdefg", columns=columns("x"))),
        Cache(made(tmp_path / "two", "gfedcba", per_shard=3, columns=columns("y"))),
    )
    texts = {k: [f"{k}{n}" for n in range(3)] for k in "abcdefg"}
    prompts = Cache(
        made(
            tmp_path / "p",
            ["", *(t for v in texts.values() for t in v)],
            split="",
            columns=columns("text.hidden"),
        ),
        "",
    )
    data = Joined(one, two, prompts=prompts, texts=texts, seed=1)
    places = [(i, 7 * step + i) for step in range(9) for i in (3, 0, 6, 1)]
    batch = data.__getitems__(places)
    assert torch.equal(batch["x"], batch["y"]) and all(t[0] == i for t, i in zip(batch["text"], batch["id"]))
    assert batch["text.hidden"][:, 0].tolist() == [value([t]) for t in batch["text"]]
    assert {t for t in batch["text"] if t[0] == "a"} == {"a0", "a1", "a2"}  # each variant has its turn
    assert (
        data.__getitems__(places)["text"] == batch["text"]
        and Joined(one, two, prompts=prompts, texts=texts, seed=2).__getitems__(places)["text"]
        != batch["text"]
    )
    with pytest.raises(UserError, match="has no row for 'g' .*run sdcourse cache again"):
        Joined(one, Cache(made(tmp_path / "three", "abcdef")))
    with pytest.raises(UserError, match="has no row for 'new' "):
        Joined(one, prompts=prompts, texts=texts | {"a": ["new"]})
    two.__class__ = type(
        "Shuffled", (Cache,), {"__getitems__": lambda self, at: Cache.__getitems__(self, at[::-1])}
    )
    with pytest.raises(RuntimeError, match="rows of other items"):
        data.__getitems__([(0, 0), (1, 1)])


def test_the_fingerprint_follows_key_and_rows(tmp_path):
    print_of = lambda name, *a, **k: Cache(made(tmp_path / name, *a, **k)).fingerprint()
    assert print_of("a", "abc") == print_of("b", "abc")
    assert (
        len(
            {
                print_of("a", "abc"),
                print_of("c", "abd"),
                print_of("d", "abc", key={"size": 1}),
                print_of("e", "acb"),
            }
        )
        == 4
    )


def test_one_long_caption_does_not_make_all_rows_long(tmp_path):
    "Case 36: 25,000 prompts, one of 20,000 characters, took 2 GB."
    ids = ["x" * 20_000, *(f"a cat {i}" for i in range(999))]
    cache = Cache(made(tmp_path / "p", ids, "", 1000, kind="prompts"), "")
    assert cache.ids.nbytes < 100_000
    assert cache[0]["id"] == ids[0] and cache.__getitems__([999, 1])["id"].tolist() == [ids[999], ids[1]]
