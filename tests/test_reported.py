"""Inputs of public bug reports that no other file of tests holds: each with what must come of it."""

import io
import json
import os
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from hostile import lay_what_is_no_file
from sdcourse import cli
from sdcourse.commands.generate import rows_of_file
from sdcourse.config import load_config
from sdcourse.core import UserError, check_outside, read_json
from sdcourse.data.images import BadImage, open_image
from sdcourse.data.manifests import table_rows
from sdcourse.data.sampling_weights import SamplingWeights
from sdcourse.data.sources import HubSet
from sdcourse.dataset import pictures
from sdcourse.evaluation.stats import load_stats

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def stored(im, format, **options):
    out = io.BytesIO()
    im.save(out, format, **options)
    return out.getvalue()


def laid(folder, **files):
    "A folder of files; the name with its suffix after two underscores."
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def scanned(folder, *options):
    "(exit code, the list)"
    code = cli.main(["scan", str(folder), "--limit", "0.9", *options])
    return code, read_json(folder / "scan.json") if (folder / "scan.json").is_file() else None


def test_a_profile_of_megabytes_is_no_damage():
    "Case 13: Pillow limits what a PNG may unpack."
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = stored(NOISE, "PNG", icc_profile=profile + bytes(2_000_000))
    assert open_image(data).size == (64, 48)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_a_cut_file_of_any_format_is_refused(format):
    "Case 15: half of the file is gone."
    data = stored(NOISE, format)
    assert open_image(data).size == (64, 48)
    with pytest.raises(BadImage):
        open_image(data[: len(data) // 2])


def test_suffixes_in_any_case_are_read_and_others_counted(tmp_path, caplog):
    "Case 24: .PNG, .JPeG, .jpe and .jfif are pictures; .jp2 is said."
    suffixes = ["PNG", "JPeG", "jfif", "jpe", *["png"] * 20]
    for i, suffix in enumerate(suffixes):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        format = "PNG" if suffix.lower() == "png" else "JPEG"
        laid(tmp_path, **{f"{i}__{suffix}": stored(Image.fromarray(pixels), format)})
    laid(tmp_path, e__jp2=b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50))
    found = pictures(tmp_path)
    assert set(found.ids) == {str(i) for i in range(len(suffixes))} and "e.jp2" in caplog.text
    whole = (tmp_path / "2.jfif").read_bytes()
    laid(tmp_path, **{"2__jfif": whole[: len(whole) // 2]})
    code, listed = scanned(tmp_path)
    assert [b["file"] for b in listed["bad"]] == ["2.jfif"]


def test_a_scan_names_a_format_that_hides_behind_a_suffix(tmp_path):
    "Case 25: AVIF, called .jpg by a network of caches."
    laid(tmp_path, a__png=stored(NOISE, "PNG"), b__jpg=b"\0\0\0\x1cftypavif" + bytes(40))
    code, listed = scanned(tmp_path)
    assert [b["file"] for b in listed["bad"]] == ["b.jpg"] and "AVIF" in str(listed["bad"][0])


@pytest.mark.parametrize("kind", ["pipe", "device", "name"])
def test_a_scan_ends_in_one_line_where_no_file_is(tmp_path, capsys, kind):
    "Cases 27 and 29: it never reads from a pipe or a device, and leaves no journal that blocks readers."
    laid(tmp_path, a__png=stored(NOISE, "PNG"))
    lay_what_is_no_file(tmp_path, kind)
    code, listed = scanned(tmp_path)
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not (tmp_path / "scan.json.partial").exists()
    if code == 2:
        assert said.err.count("\n") == 1 and listed is None
    else:
        assert len(listed["bad"]) == 1


def test_a_profile_is_odd_and_not_bad(tmp_path):
    "Case 14: it is listed, for its pixels are converted when they are read."
    from test_images import adobe_rgb

    laid(tmp_path, a__png=stored(NOISE, "PNG", icc_profile=adobe_rgb()))
    listed = scanned(tmp_path)[1]
    assert not listed["bad"] and "colours" in str(listed["odd"])


def test_tars_of_dotted_names_alone_are_refused(tmp_path, capsys):
    "Case 19: nothing could be read of them, and the exit code said 0."
    import tarfile

    with tarfile.open(tmp_path / "a-0.tar", "w") as tar:
        for name in ("22.01.png", "22.02.png"):
            info = tarfile.TarInfo(name)
            data = stored(NOISE, "PNG")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert cli.main(["shards", str(tmp_path), str(tmp_path)]) == 2
    assert "22.01.png" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_turns_pictures_of_every_format(format, orientation):
    "Case 42: the eight orientations, and one that does not exist."
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if format == "WEBP" else dict(quality=95)
    found = open_image(stored(NOISE, format, exif=exif, **options))
    assert found.size == ((48, 64) if orientation > 4 else (64, 48))
    exif[0x0112] = 99
    assert open_image(stored(NOISE, format, exif=exif, **options)).size == (64, 48)


# ---- case 42
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def sixteen_bits(kind, channels):
    "A PNG of one colour with sixteen bits per channel: 0xc0ff, and an opaque alpha where it has one."
    row = struct.pack(">H", 0xC0FF) * (channels - (kind in (4, 6))) + b"\xff\xff" * (kind in (4, 6))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0),
        b"IDAT": zlib.compress((b"\0" + row * 8) * 8),
        b"IEND": b"",
    }
    found = [
        struct.pack(">I", len(v)) + k + v + struct.pack(">I", zlib.crc32(k + v)) for k, v in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(found)


def with_xmp():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP)
    return stored(NOISE, "PNG", pnginfo=info)


def in_lab():
    profiles = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    return stored(ImageCms.profileToProfile(NOISE, *profiles, outputMode="LAB"), "TIFF")


def numbered(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(NOISE, "JPEG", exif=exif, quality=95)


TWO = dict(save_all=True, append_images=[Image.new("RGB", NOISE.size)])
KINDS = {  # name: bytes, size, what the scan says
    "deep__png": (sixteen_bits(6, 4), (8, 8), "deep"),
    "grey__png": (sixteen_bits(4, 2), (8, 8), "deep"),
    "plain__png": (sixteen_bits(2, 3), (8, 8), "deep"),
    "xmp__png": (with_xmp(), (48, 64), "turned"),
    "xmp__webp": (stored(NOISE, "WEBP", xmp=XMP.encode(), lossless=True), (48, 64), "turned"),
    "odd__jpg": (numbered(99), (64, 48), ""),
    "lab__tif": (in_lab(), (64, 48), ""),
    "phone__jpg": (stored(NOISE, "MPO", **TWO), (64, 48), ""),
    "film__gif": (stored(NOISE, "GIF", **TWO), (64, 48), "frames"),
    "film__png": (stored(NOISE, "PNG", **TWO), (64, 48), "frames"),
    "film__webp": (stored(NOISE, "WEBP", lossless=True, **TWO), (64, 48), "frames"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_a_picture_is_is_seen_and_said(tmp_path, name):
    "Case 42: it is read as it is meant, and the list says what was done with it, nothing else."
    data, size, said = KINDS[name]
    seen = open_image(data)
    assert seen.mode == "RGB" and seen.size == size
    if said == "deep":
        assert np.unique(seen).tolist() == [0xC0]
    elif "film" in name or "lab" in name:
        apart = np.abs(np.asarray(seen, dtype=int) - np.asarray(NOISE)).mean()
        assert apart < (25 if "gif" in name else 4)
    laid(tmp_path, **{name: data})
    listed = scanned(tmp_path, "--limit", "1")[1]
    kinds = {e["kind"] for e in listed["bad"] + listed["odd"]} - {"palette"}
    assert kinds == ({said} if said else set())


# ---- case 9
def test_half_a_character_in_a_table_goes_into_tars(tmp_path):
    (tmp_path / "in/train").mkdir(parents=True)
    laid(tmp_path / "in/train", a__png=stored(NOISE, "PNG"))
    (tmp_path / "in/train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "cut \\ud83d"}\n')
    assert cli.main(["shards", str(tmp_path / "in"), str(tmp_path / "tars")]) == 0
    assert pictures(tmp_path / "tars").row(0)["texts"] == ["cut \ufffd"]


# ---- case 45
IN, OUT = "{in}", "{in}/file/x/y"
BELOW = {
    "cache": ["cache", "latents", IN, OUT, "--model", "tiny-vae"],
    "shards": ["shards", IN, OUT],
    "scan": ["scan", IN, "--out", OUT],
    "scan over a file": ["scan", IN, "--out", "{in}/file"],
    "prepare": ["prepare", "scenes", OUT, "--train", "1"],
    "copy-images": ["copy-images", IN, OUT, "--split", "train"],
    "evaluate": ["evaluate", IN, "--reference", IN, "--split", "train", "--out", OUT],
    "index over a file": ["shards", "{in}/tars", "{in}/file"],
    "index over a cache": ["shards", "{in}/tars", "{in}/cache"],
}


@pytest.mark.parametrize("name", BELOW)
def test_a_file_in_the_way_is_one_line_and_stays(tmp_path, capsys, name):
    "What is in the place of OUT or above it belongs to somebody else; the same command again would not help."
    for folder in ("train", "tars", "cache"):
        (tmp_path / folder).mkdir()
    laid(tmp_path / "train", a__png=stored(NOISE, "PNG"))
    laid(tmp_path, file=b"a thesis")
    laid(tmp_path / "cache", index__json=json.dumps(dict(format=1, kind="latents", shards=[])).encode())
    laid(tmp_path / "tars", a__tar=b"")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert cli.main([word.replace("{in}", str(tmp_path)) for word in BELOW[name]]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "choose another" in said and "again" not in said, said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# ---- kinds 2, 3, 7 and 8, by other cases than those of faults.md
class Hung(BaseException):
    "Which no reader takes for a fault of its file."


def read_csv(path):
    return list(table_rows(path))


READERS = dict(
    config=load_config,
    weights=SamplingWeights,
    prompts=rows_of_file,
    json=read_json,
    statistics=load_stats,
    table=read_csv,
)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_given_as_a_file_is_one(tmp_path, name, kind):
    "A pipe without a writer was waited for, for ever, and SIGTERM was not heard meanwhile."
    path = tmp_path / "x.csv"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()

    def hung(*_):
        raise Hung

    old = signal.signal(signal.SIGALRM, hung)
    signal.alarm(3)
    try:
        with pytest.raises((UserError, OSError)) as e:
            READERS[name](path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert "\n" not in str(e.value) and "x.csv" in str(e.value)


def test_two_values_of_one_name_are_refused(tmp_path):
    "The last one was taken: other weights, another caption."
    (tmp_path / "w.json").write_text('{"0": 1, "0": 2}')
    with pytest.raises(UserError, match="w.json: not valid JSON .the key '0' is there twice"):
        SamplingWeights(tmp_path / "w.json")
    (tmp_path / "p.jsonl").write_text('{"id": "a", "text": "x", "text": "y"}')
    with pytest.raises(UserError, match="p.jsonl:1: .*the key 'text' is there twice"):
        rows_of_file(tmp_path / "p.jsonl")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    from test_fill import pictures as painted

    return painted(tmp_path_factory.mktemp("few") / "d", n=4, val=2)


@pytest.mark.parametrize(
    "line",
    [
        "shards {d} {d}/out",
        "copy-images {d} {d}/out --split val",
        "generate tiny-sd15 {d}/train/out --data {d} --split val",
        "evaluate {d} --reference {d} --split val --out {d}/out",
        "caption export {d} {d}/out",
        "prepare folder {d} {d}/out",
        "prepare imagenet {d} {d}/out",
    ],
)
def test_what_is_written_into_a_set_would_be_a_part_of_it(few, line, capsys):
    "A copy within the set made the set unreadable: its pictures lay in none of the splits."
    before = sorted(few.rglob("*"))
    assert cli.main(line.format(d=few).split()) == 2
    said = capsys.readouterr().err
    assert "lies inside" in said and "choose another OUT" in said and said.count("\n") == 1
    assert sorted(few.rglob("*")) == before


def test_an_output_beside_a_set_is_none_of_it(few, tmp_path, monkeypatch):
    monkeypatch.chdir(few.parent)
    check_outside(f"{few}-2", few, "", "digits", few / "not there")
    check_outside(tmp_path / "x", few)


def test_remedies_that_help(few, tmp_path, capsys, caplog):
    "A file is no folder that may not be entered; captions are not to be renamed; an id can be made shorter."
    picture = next((few / "train").glob("*.png"))
    assert cli.main(["scan", str(picture)]) == 2
    assert "is a file; give the folder of the pictures" in capsys.readouterr().err
    bare = tmp_path / "bare"
    (bare / "train").mkdir(parents=True)
    NOISE.save(bare / "train/0.png")
    NOISE.save(bare / "train/1.png")
    (bare / "train/metadata.jsonl").write_text(
        '{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}\n'
    )
    words = ["cache", "prompts", str(bare), str(tmp_path / "p"), "--model", "tiny-sd15"]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "1 of 2 rows have no caption, the first is 1; write captions, give --caption-column" in said
    (tmp_path / "d/train").mkdir(parents=True)
    NOISE.save(tmp_path / "d/train" / ("\u00e9" * 100 + ".png"))
    assert cli.main(["shards", str(tmp_path / "d"), str(tmp_path / "t")]) == 2
    assert "give it a shorter one in metadata.jsonl" in capsys.readouterr().err


def test_a_folder_that_is_not_there_may_be_a_name_of_the_hub(tmp_path, monkeypatch, capsys):
    "Both are said, with the neighbour that may be meant, and what helps."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "mine/photos").mkdir(parents=True)
    for name, words in {
        "mine/photo": "mine/photo: no such folder, did you mean 'photos'\\?; a set of the Hub needs",
        "nobody/nothing": "no such folder, and there is no folder nobody either; a set of the Hub needs",
        "mine/photos": "mine/photos: its files are read by the package datasets: pip install",
    }.items():
        with pytest.raises(UserError, match=words) as e:
            HubSet(name)
        assert "\n" not in str(e.value) and ("hf download" in str(e.value)) == (name != "mine/photos")
