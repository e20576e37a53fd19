"""`sdcourse caption`: the same table however often it was killed and by however many ranks, what changed is
written again and nothing else, and captions land where readers look without hiding anything.
"""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import ranks
import warm
from sdcourse import cli
from sdcourse.caption import write as module
from sdcourse.caption.land import land
from sdcourse.caption.table import read_captions
from sdcourse.caption.write import (
    CaptionJob,
    WriteOptions,
    Captioning,
    TemplateOptions,
    caption_template,
    run_captions,
)
from sdcourse.core import UserError
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.data.sets.scenes import ScenesOptions, prepare_scenes
from sdcourse.dataset import pictures

SLOW = Path(__file__).parent / "slow_caption.py"
FIRST = "import torch, psutil, sdcourse.engine.work, sdcourse.engine.dist, sdcourse.caption.write"
WORDS = "template scenes --splits val --batch 1 --device cpu".split()


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).glob("*.json*"))}


def prepared(folder):
    "A set of scenes with a manifest."
    prepare_scenes(folder, ScenesOptions(train=24, val=4, test=2, size=24, workers=1))
    return folder


class Lengths(CaptionJob):
    "A captioner of pixels that counts how often each batch comes, and needs its neighbours."

    kind = "lengths"
    seen = []

    def open(self, device):
        self.origin |= dict(model="m", model_hash="1", prompt_hash=self.prompt, precision="fp32")

    prompt = "p"

    def write(self, ids, items):
        self.seen.append(ids)
        items = module.padded(items, self.cfg.batch)
        total = sum(sum(im.getpixel((0, 0))) for im in items)
        return [(f"{sum(im.getpixel((0, 0)))} of {total}", "written") for im in items[: len(ids)]]


def lengths(source, prompt="p", **over):
    "Run it; the ids that were written."
    Lengths.seen, Lengths.prompt = [], prompt
    options = WriteOptions(**dict(device="cpu", batch=4) | over)
    assert run_captions(Lengths, source, options) == 0
    return [id for ids in Lengths.seen for id in ids]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture
def data(scenes, tmp_path):
    "A copy of it, which a test may change."
    return Path(shutil.copytree(scenes, tmp_path / "data"))


# ---- kills and ranks
KILL = """
import os, random, sys, time
sys.path[:0] = {path!r}
import slow_caption
out, rng = {out!r}, random.Random(0)
def notes():
    path = out + ".notes.0"
    return len(open(path).read().split()) if os.path.exists(path) else 0
def begin(where, slow):
    if pid := os.fork(): return pid
    os.environ["SLOW"], os.environ["NOTES"] = slow, where + ".notes"
    os._exit(slow_caption.cli.main(["caption", *{words!r}, "--out", where]))
for kill in range(5):
    target = notes() + rng.randrange(1, 40)
    pid = begin(out, "0.004")
    while notes() < target and not os.waitpid(pid, os.WNOHANG)[0]: time.sleep(0.002)
    os.kill(pid, 9); os.waitpid(pid, 0)
    print("KILL", notes(), flush=True)
for where in (out, out + "-whole"): assert os.waitpid(begin(where, "0"), 0)[1] == 0
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "(killed five times, never killed, ids that were written in both)"
    root = tmp_path_factory.mktemp("killed")
    code = KILL.format(path=[str(SLOW.parent), str(SLOW.parent.parent)], out=str(root / "c"), words=WORDS)
    done = warm.run(["-c", code], first=FIRST)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("KILL") == 5, done.stdout
    notes = [(root / f"{name}.notes.0").read_text().split() for name in ("c", "c-whole")]
    return root / "c", root / "c-whole", notes


def test_killed_five_times_it_ends_with_the_same_table(killed):
    "No unit that was whole is done twice: a kill costs less than one."
    out, whole, (often, once) = killed
    assert content(out) == content(whole) and len(read_captions(out, "val").texts("template")) == 256
    assert len(once) == 256 == len(set(often)) and len(often) <= 256 + 5 * 16
    assert not list((out / "parts").iterdir())


def test_two_ranks_write_the_same_table(killed, tmp_path):
    ends = ranks.finish(
        ranks.start([SLOW, *WORDS, "--out", tmp_path / "c"], 2, first=FIRST, NOTES=str(tmp_path / "n"))
    )
    assert [c for c, _, _ in ends] == [0, 0], ends
    assert content(tmp_path / "c") == content(killed[1])
    mine = [Path(f"{tmp_path}/n.{r}").read_text().split() for r in (0, 1)]
    assert not set(mine[0]) & set(mine[1]) and len(mine[0]) == len(mine[1]) == 128


# ---- what changed, and nothing else
def test_what_changed_is_written_again_and_nothing_else(data):
    (data / "manifest.json").unlink()  # else another picture is refused as altered
    ids = [str(i) for split in ("train", "val", "test") for i in pictures(data, split).ids]
    assert lengths(data) == ids and lengths(data) == []
    assert lengths(data, prompt="q") == ids and lengths(data, prompt="q", batch=5) == ids
    name = json.loads((data / "train/metadata.jsonl").read_text().splitlines()[3])["file_name"]
    Image.new("RGB", (24, 24), "red").save(data / "train" / name)
    before = read_captions(data / ".captions", "train").rows
    assert lengths(data, prompt="q", batch=5) == ids[3:4]
    after = read_captions(data / ".captions", "train").rows
    changed = [key for key, row in after.items() if row != before[key]]
    assert changed == [("lengths", ids[3])] and list(after) == list(before)
    assert after[changed[0]]["text"] == "255 of 1275"  # with four copies of itself
    lines = (data / "val/metadata.jsonl").read_text().splitlines()
    (data / "val/metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (data / "val" / json.loads(lines[0])["file_name"]).unlink()
    assert lengths(data, prompt="q", batch=5) == []
    assert len(read_captions(data / ".captions", "val").rows) == 3


def test_a_broken_picture_is_listed_and_the_rest_is_whole(data, capsys):
    (data / "manifest.json").unlink()
    first = json.loads((data / "train/metadata.jsonl").read_text().splitlines()[0])
    (data / "train" / first["file_name"]).write_bytes(b"")
    written = lengths(data)
    table = read_captions(data / ".captions", "train")
    row = table.rows["lengths", str(first["id"])]
    assert str(first["id"]) not in written and row["text"] is None and "no bytes" in row["problem"]
    assert len(table.texts("lengths")) == 23 and lengths(data) == []
    landed = json.loads((data / "train/metadata.jsonl").read_text().splitlines()[0])
    assert landed["text_lengths"] is None and landed["captions"] == []


def test_many_broken_pictures_stop_it_before_anything_lands(data):
    (data / "manifest.json").unlink()
    before = (data / "train/metadata.jsonl").read_bytes()
    for path in sorted((data / "train").glob("*.png"))[:8]:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="8 of 30 pictures cannot be read and have no caption"):
        lengths(data)
    assert (data / "train/metadata.jsonl").read_bytes() == before


def test_a_picture_that_changes_meanwhile_is_refused(data):
    (data / "manifest.json").unlink()
    job = Lengths(data, WriteOptions(device="cpu"), "cpu")
    row = job.inputs()["train"][0]
    path = job.splits["train"].path(0)
    Image.new("RGB", (24, 24), "red").save(path)
    with pytest.raises(UserError, match="changed while it was captioned; run the same command again"):
        job.find("train", row)


def test_batches_are_full_and_always_the_same(data):
    "What is left after a unit falls into the batches that it would have fallen into."
    lengths(data, splits=("train",), land=False)
    whole = read_captions(data / ".captions", "train").rows
    assert [len(b) for b in Lengths.seen] == [4] * 6
    shutil.rmtree(data / ".captions")
    job = Lengths(data, WriteOptions(device="cpu", batch=4, splits=("train",)), "cpu")
    work = Captioning(job)
    (data / ".captions").mkdir()
    work.claim()
    [unit] = work.todo()
    work.do(dict(name="train-00007", split="train", rows=unit["rows"][8:16]), lambda n: True)
    assert len(lengths(data, splits=("train",))) == 16
    assert read_captions(data / ".captions", "train").rows == whole
    assert lengths(data, splits=("val", "test")) and [len(b) for b in Lengths.seen] == [4, 2]


def test_a_stop_within_a_unit_leaves_no_part_of_it(data):
    work = Captioning(Lengths(data, WriteOptions(device="cpu", batch=4), "cpu"))
    (data / ".captions").mkdir()
    work.claim()
    unit = work.todo()[0]
    answers = iter([True, False])
    work.do(unit, lambda n: next(answers))
    assert work.left() == len(work.units) and not list((data / ".captions/parts").iterdir())


# ---- in the metadata of the data set
def landed(data, split="train"):
    return [json.loads(line) for line in (data / split / "metadata.jsonl").read_text().splitlines()]


def test_captions_land_beside_those_that_were_there(data):
    "Every reader finds them, `verify` still holds, and a set without captions of its own has these."
    own = [pictures(data).row(i)["texts"] for i in range(24)]
    lengths(data)
    assert caption_template(data, TemplateOptions(device="cpu")) == 0
    rows = landed(data)
    assert all(r["captions"] == [r["text_lengths"], r["text_template"]] for r in rows)
    assert [pictures(data).row(i)["texts"] for i in range(24)] == own
    mixed = pictures(data, caption_column="text_template,text_lengths").row(0)["texts"]
    assert mixed == [rows[0]["text_template"], rows[0]["text_lengths"]]
    assert verify(load_manifest(str(data / "manifest.json")), data) == []
    bare = [{k: v for k, v in r.items() if k != "text"} for r in rows]
    (data / "train/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bare))
    assert pictures(data).row(0)["texts"] == rows[0]["captions"]


def test_an_altered_picture_is_not_signed(data):
    "The manifest is written anew, and would make it look right."
    lengths(data)
    table = data / "train/metadata.jsonl"
    other = sorted((data / "val").glob("*.png"))[0]
    other.write_bytes(other.read_bytes()[:-1] + b"x")
    before = table.read_bytes()
    table_of = read_captions(data / ".captions", "train")
    table_of.add([dict(id="1", variant="more", text="x")])
    table_of.write([])
    with pytest.raises(UserError, match="its bytes are not those of the manifest"):
        land(data, data / ".captions")
    assert table.read_bytes() == before


def test_a_kill_while_landing_is_mended_by_the_same_command(data, monkeypatch):
    "After each write: tables are whole, the manifest is in step at the end, columns are known as ours."
    from sdcourse.caption import land as landing

    real, count = landing.write_lines, []

    def dies(path, rows):
        count.append(path)
        if len(count) == limit:
            raise KeyboardInterrupt
        real(path, rows)

    monkeypatch.setattr(landing, "write_lines", dies)
    for limit in (2, 3, 5):
        count.clear()
        try:
            lengths(data, prompt=str(limit))
        except KeyboardInterrupt:
            pass
    monkeypatch.setattr(landing, "write_lines", real)
    assert lengths(data, prompt="5") == []
    assert verify(load_manifest(str(data / "manifest.json")), data) == []
    assert all(r["text_lengths"] for split in ("train", "val", "test") for r in landed(data, split))


def test_a_table_for_all_splits_and_pictures_with_texts_beside_them(data, tmp_path):
    "One metadata.jsonl at the top; or none, and .txt files: their text becomes a column."
    rows = [
        dict(r, file_name=f"{s}/{r['file_name']}") for s in ("train", "val", "test") for r in landed(data, s)
    ]
    whole, beside = tmp_path / "whole", tmp_path / "beside"
    for copy in (whole, beside):
        shutil.copytree(data, copy)
        for name in ("train", "val", "test"):
            (copy / name / "metadata.jsonl").unlink()
        (copy / "manifest.json").unlink()
    (whole / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    lengths(whole)
    new = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in new] == [r["file_name"] for r in rows]
    assert all(r["text_lengths"] for r in new) and len(pictures(whole, "val")) == 4
    for path in beside.rglob("*.png"):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    lengths(beside)
    row = pictures(beside).row(0)
    assert row["texts"] == [f"a picture called {row['id']}"] and row["text_lengths"]


def test_folders_of_classes_are_not_hidden(data, capsys):
    (data / "manifest.json").unlink()
    for split in ("train", "val", "test"):
        (data / split / "metadata.jsonl").unlink()
        for i, path in enumerate(sorted((data / split).glob("*.png"))):
            (data / split / "ab"[i % 2]).mkdir(exist_ok=True)
            path.rename(data / split / "ab"[i % 2] / path.name)
    lengths(data)
    assert "has its classes in folders" in capsys.readouterr().out
    assert pictures(data).classes == ("a", "b") and not list(data.rglob("metadata.jsonl"))


# ---- wrong input, one line each, before any work
@pytest.mark.parametrize(
    "words, said",
    [
        (
            "template scenes",
            "scenes: is no folder, so its captions need a place of their own; give --out FOLDER",
        ),
        ("template photos --out {}", "have no facts"),
        ("template scenes --out {} --leave-out Atractive", "did you mean 'Attractive'"),
        ("template scenes --out {} --variant Blip-2", "give small letters, digits and _"),
        ("template scenes --out {} --splits tests", "has no split tests"),
        ("templates scenes", "did you mean 'template'"),
        ("export scenes {}", "give --out FOLDER"),
        ("export scenes {} --captions {}", "has no captions of train; write them first"),
    ],
)
def test_wrong_words_are_one_line(tmp_path, capsys, words, said):
    out = tmp_path / "o"
    assert cli.main(["caption", *(w.format(out) for w in words.split())]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error
    assert not list(out.rglob("*.jsonl"))


def test_a_column_of_another_origin_is_not_overwritten(data):
    (data / "manifest.json").unlink()
    rows = [r | {"text_lengths": "mine"} for r in landed(data)]
    (data / "train/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match="rename it, give another --variant, or --no-land"):
        lengths(data)
    assert Lengths.seen == [] and landed(data) == rows
    assert lengths(data, land=False) and landed(data) == rows
    assert lengths(data, variant="other")


def test_no_space_is_one_line_and_the_same_command_goes_on(data, monkeypatch, capsys):
    real = module.write_part

    def full(home, unit, rows):
        if unit["name"] == "val-00000":
            raise OSError(28, "No space left on device", str(home))
        real(home, unit, rows)

    monkeypatch.setattr(module, "write_part", full)
    with pytest.raises(
        UserError, match="No space left on device; what was saved is intact and the same command goes on"
    ):
        lengths(data)
    monkeypatch.setattr(module, "write_part", real)
    assert len(lengths(data)) == 6  # of val and test
