"""X1: what a command writes every reader reads alike, whichever names, captions and ids it holds.

`prepare` writes a folder; `copy-images`, `shards` and `generate` read it and write another; all of them,
`cache`, `verify` and the trainers' view read those.
"""

import json
import tarfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from test_imagefolder import made

from sdcourse.cache.store import FORMAT, Cache, extend_plan, write_shard
from sdcourse.commands.copy_images import CopyOptions, copy_images
from sdcourse.commands.generate import GenerateOptions, json_line, plan_pictures, rows_of_data, rows_of_file
from sdcourse.core import HALF, UserError
from sdcourse.data.imagefolder import PictureJob, file_names, write_lines
from sdcourse.data.manifests import verify
from sdcourse.data.shards import Shards, make_shards
from sdcourse.dataset import pictures

HARD = [
    "one\u2028two\u2029three",  # separators that some readers take for ends of lines
    "next\x85line, form\x0cfeed, \x0b\x1c\x1d\x1e",
    "half of a character: \ud83d!",
    "\ufeffmark of an editor\ufeff",
    "\"quoted\", 'and' \\ back\\n slashed, {json: [1]}",
    "tab\tcarriage\rreturn\r\nfeed\nend",
    "e\u0301 \u00e9 \u202e right to left \U0001f642 \u0000 zero",
    "# a comment, - a list: of YAML",
    "x" * 200_000,
]
TEXT = st.one_of(
    st.sampled_from(HARD[:-1]), st.text(max_size=20), st.text(alphabet='\u2028\x85\x0c\ufeff" ,\n\ud83d')
)
ROW = st.tuples(st.text(min_size=1, max_size=6), st.lists(TEXT, max_size=3), st.integers(0, 1))
ROWS = st.lists(ROW, min_size=1, max_size=3, unique_by=lambda r: HALF.sub("\ufffd", r[0]))


def paint(i):
    return Image.new("RGB", (3, 2), (i, 40, 200))


def seen(source, split="train"):
    "[(id, captions, label, first pixel)] as the view of all readers has them."
    data = pictures(source, split)
    rows = data.rows(range(len(data)))
    pixels = [data.image(i).getpixel((0, 0)) for i in range(len(data))]
    return [(r["id"], r["texts"], r["label"], p) for r, p in zip(rows, pixels)]


def first_only(found):
    return [(k, texts[:1], label, pixel) for k, texts, label, pixel in found]


def prepared(out, rows):
    names = file_names([k for k, _, _ in rows])
    jobs = [
        PictureJob("train", name, {"id": k, "texts": texts, "label": label}, (i,))
        for i, (name, (k, texts, label)) in enumerate(zip(names, rows))
    ]
    assert made(out, jobs, paint)
    return out


def generated(out, source):
    "The folder that `generate` writes for these captions, without a model."
    rows = plan_pictures(GenerateOptions(data=str(source), split="train"))
    home = out / "train"
    home.mkdir(parents=True)
    for i, row in enumerate(rows):
        paint(i).save(home / row["file_name"])
    (home / "metadata.jsonl").write_text("".join(map(json_line, rows)), encoding="utf-8")
    return out


def cached(out, found):
    "A cache whose rows are these texts, as `cache prompts` plans them."
    texts = list(dict.fromkeys(["", *(t for _, ts, _, _ in found for t in ts)]))
    index = dict(format=FORMAT, kind="prompts", key={}, facts={}, shards=[], dropped={})
    index["columns"] = {"x": {"dtype": "float32", "shape": []}}
    out.mkdir()
    extend_plan(out, index, {"": [[t] for t in texts]}, 2)
    at = 0
    for shard in index["shards"]:
        write_shard(out, shard, {"x": torch.arange(at, at + shard["rows"]).float()})
        at += shard["rows"]
    return texts, Cache(out, "", kind="prompts")


@given(ROWS)
@example([("a", HARD, 1)])
@example([(text[:20], [text], i % 2) for i, text in enumerate(HARD[:-1])])
@example(
    [
        (".hidden", [], 0),
        ("a/b", ["\u2028"], 1),
        ("a.b", ["\x85 x"], 0),
        ("A/B", [""], 1),
        ("\ud83d", ["y"], 1),
    ]
)
@settings(max_examples=15, deadline=None)
def test_every_reader_reads_what_every_writer_wrote(tmp_path_factory, rows):
    home = tmp_path_factory.mktemp("x1")
    source = prepared(home / "prepared", rows)
    found = seen(source)
    clean = [(HALF.sub("\ufffd", k), [HALF.sub("\ufffd", t).strip() for t in texts]) for k, texts, _ in rows]
    assert [(k, texts) for k, texts, _, _ in found] == [(k, [t for t in texts if t]) for k, texts in clean]
    assert [(label, pixel[0]) for _, _, label, pixel in found] == [(r[2], i) for i, r in enumerate(rows)]
    for name, link in (("copied", False), ("linked", True)):
        assert copy_images(source, home / name, CopyOptions(split="train", link=link)) == 0
        assert seen(home / name) == first_only(found)
    for name, of in (("tars", source), ("tars of a copy", home / "copied")):
        assert make_shards(of, home / name, Shards()) == 0
        assert sorted(seen(home / name)) == sorted(seen(of))
    members = [n for tar in (home / "tars").glob("*.tar") for n in tarfile.open(tar).getnames()]
    assert {unquote(n.partition(".")[0]) for n in members} == {
        k for k, *_ in found
    }  # as webdataset cuts them
    assert copy_images(home / "tars", home / "unpacked", CopyOptions(split="train")) == 0
    assert sorted(seen(home / "unpacked")) == sorted(first_only(found))
    texts, cache = cached(home / "cache", found)
    assert cache.ids.tolist() == texts and cache.numbers(texts).tolist() == list(range(len(texts)))
    assert [cache[i]["x"] for i in range(len(texts))] == list(range(len(texts)))
    drawable = [r for r in found if r[1]]
    if len(drawable) == len(found):
        asked = rows_of_data(GenerateOptions(data=str(home / "copied"), split="train"))
        write_lines(home / "prompts.jsonl", asked)
        assert rows_of_file(home / "prompts.jsonl") == asked
        drawn = seen(generated_or_told(home / "drawn", home / "copied") or home / "copied")
        assert [r[:2] for r in drawn] == [r[:2] for r in first_only(found)]


def generated_or_told(out, source):
    "None where an id makes no file name: that is said in one line before anything is drawn."
    try:
        return generated(out, source)
    except UserError as e:
        assert "\n" not in str(e) and "id" in str(e)


@pytest.mark.parametrize("text", HARD)
def test_strict_json_lines_for_any_other_program(tmp_path, text):
    "One line per row by the rules of JSON lines, without what strict readers refuse."
    write_lines(tmp_path / "a.jsonl", [dict(id=text[:9], text=text, score=float("nan"))] * 2)
    raw = (tmp_path / "a.jsonl").read_bytes()
    lines = raw.split(b"\n")
    assert len(lines) == 3 and not lines[-1]
    for line in lines[:-1]:
        row = json.loads(line.decode("utf-8"), parse_constant=lambda name: pytest.fail(name))
        assert row == dict(id=HALF.sub("\ufffd", text[:9]), text=HALF.sub("\ufffd", text), score=None)


def test_verify_finds_nothing_wrong(tmp_path):
    source = prepared(tmp_path / "p", [(text[:20], [text], 0) for text in HARD])
    manifest = json.loads(Path(source / "manifest.json").read_text(encoding="utf-8"))
    assert list(verify(manifest, source)) == []
