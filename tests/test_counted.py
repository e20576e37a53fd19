"""X2 as a table: what is left out is counted, and the command that a message names does what it says.

A case is a folder, a command, words that must be said, and what a message's own command must then have made
possible. A command stands in the message itself; capitals in it are for the reader to fill in.
"""

import io
import json
import re

import pytest
import tiny_models
from PIL import Image

from sdcourse import cli
from sdcourse.core import UserError


def png(i, size=16):
    out = io.BytesIO()
    Image.effect_noise((size, size), 60 + i).convert("RGB").save(out, "PNG")
    return out.getvalue()


def many(folder, n=10, **more):
    "n pictures and their table, with these columns."
    rows = [{"file_name": f"{i}.png", "text": f"cat {i}"} | more for i in range(n)]
    return {f"{folder}{i}.png": png(i) for i in range(n)} | {f"{folder}metadata.jsonl": rows}


def classes(folder, n=5):
    return {f"{folder}{k}/{i}.png": png(10 * j + i) for j, k in enumerate("ab") for i in range(n)}


def without(files, *names):
    return {k: v for k, v in files.items() if k not in names}


JUDGE = (
    "evaluate SET --reference SET --split train --out {out} --extractor tiny-scenes --metrics fd --draws 2"
)
LATENTS = "cache latents {in} {out} --model {vae} --size 16 --device cpu"
TRAIN = "train sd15 --model {sd} --data {in} --latents {made} --image-size 16 --no-flip --out {out}"
BOTH = many("train/", 120)
LABELLED = many("train/", label=1)
CASES = {  # folder: bytes of a file or rows of a table; command; words; whether it ends well; then works
    "a format that is not read": (
        many("train/", 120) | {"train/x.heic": b"x"},
        "scan {in}",
        "1 of 121 .*heic",
        True,
        None,
    ),
    "a picture beside the splits": (
        BOTH | {"x.png": png(1)},
        "copy-images {in} {out} --split train",
        "1 of 121 pictures lie in none of its splits",
        True,
        None,
    ),
    "many pictures beside the splits": (
        many("train/") | {f"other/{i}.png": png(i) for i in range(9)},
        "copy-images {in} {out} --split train",
        "9 of 19 pictures lie in none of its splits",
        False,
        None,
    ),
    "a picture without a row": (
        BOTH | {"val/x.png": png(3)},
        "shards {in} {out}",
        "its split val has no metadata.jsonl, and train has one",
        True,
        None,
    ),
    "a picture without a row beside others": (
        BOTH | {"train/x.png": png(3)},
        "copy-images {in} {out} --split train",
        "train/x.png .no row in train/metadata.jsonl",
        False,
        None,
    ),
    "a row without a picture": (
        without(BOTH, "train/7.png"),
        "shards {in} {out}",
        "7.png",
        False,
        None,
    ),
    "a row without a caption": (
        many("train/", 120)
        | {"train/metadata.jsonl": [*many("", 119)["metadata.jsonl"], {"file_name": "119.png"}]},
        "cache prompts {in} {out} --model {sd} --device cpu",
        "1 of 120 rows have no caption",
        True,
        None,
    ),
    "two names of one split": (
        many("val/") | many("validation/"),
        "copy-images {in} {out} --split val",
        "mean the same split",
        False,
        None,
    ),
    "a split without labels": (
        LABELLED | many("test/"),
        LATENTS,
        "test .* has no label, and others have one \\(10 have none\\)",
        False,
        LATENTS + " --splits train",
    ),
    "classes without a table": (
        classes("train/"),
        "shards {in} {out}",
        "10 samples in 1 tars",
        True,
        None,
    ),
    "tars without an index": (
        {"a.tar": "tar"},
        "copy-images {in} {out} --split train",
        "holds tars and no index.json; run sdcourse shards {in} {in}",
        False,
        "copy-images {in} {out} --split train",
    ),
    "pictures that were added after a scan": (
        without(many("train/"), "train/metadata.jsonl") | {"scan": None, "train/y.png": png(11)},
        "copy-images {in} {out} --split train",
        "changed since it was scanned; run sdcourse scan {in} again",
        False,
        "copy-images {in} {out} --split train",
    ),
    "pictures of two sizes": (
        many("train/") | {"train/3.png": png(3, 24)},
        JUDGE.replace("SET", "{in}"),
        "sdcourse copy-images DATA OUT --size",
        False,
        JUDGE.replace("SET", "{made}"),
    ),
    "no cache of latents": (
        many("train/") | many("val/"),
        TRAIN,
        "make it with: sdcourse cache latents {in} {made} --model {sd} --size 16",
        False,
        TRAIN + " --dry-run --device cpu --batch-size 2",
    ),
}


@pytest.fixture(scope="module")
def models(built):
    return dict(vae=built(tiny_models.tiny_vae), sd=built(tiny_models.tiny_sd15))


def lay(home, files):
    for name, what in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "scan":
            assert cli.run(["scan", str(home)]) == 0
        elif what == "tar":
            lay(home.with_name("packed"), many("train/"))
            assert cli.run(["shards", str(home.with_name("packed")), str(home.with_name("tars"))]) == 0
            next(home.with_name("tars").glob("*.tar")).rename(path)
        elif isinstance(what, bytes):
            path.write_bytes(what)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in what))


def told(words, caplog, capsys):
    "(whether a command ended well, all that it said)"
    caplog.clear()
    capsys.readouterr()
    try:
        code = cli.run(words)
    except UserError as e:
        assert "\n" not in str(e)
        return False, str(e)
    return code == 0, " ".join([*capsys.readouterr(), caplog.text])


def named(message, places):
    "The words of the first command that a message names, with what it leaves open filled in."
    found = re.search(
        r"sdcourse ((?:shards|scan|copy-images|cache) [^;,()]*?)(?: again| writes| brings|[;,)]|$)", message
    )
    if not found:
        return None
    fill = dict(OUT=places["made"], DATA=places["in"], SPLIT="train", FOLDER=places["vae"])
    words = [str(fill.get(w, w)) for w in found[1].split()]
    if words[-1] == "--size":
        words += ["16", "--split", "train"]
    return [*words, "--device", "cpu"] if words[0] == "cache" else words


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_left_out_without_a_count_and_remedies_work(name, tmp_path, models, caplog, capsys):
    files, command, words, well, then = CASES[name]
    places = models | {"in": tmp_path / "in", "out": tmp_path / "out", "made": tmp_path / "made"}
    lay(tmp_path / "in", files)
    fill = lambda text: text.format(**places)  # noqa: E731
    ended, said = told(fill(command).split(), caplog, capsys)
    assert re.search(fill(words), said) and ended == well, said
    if then is None:
        return
    if remedy := named(said, places):
        assert told(remedy, caplog, capsys)[0], remedy
    ended, said = told(fill(then).split(), caplog, capsys)
    assert ended, said


def test_the_table_has_remedies_that_are_commands():
    assert sum(then is not None for *_, then in CASES.values()) >= 5
