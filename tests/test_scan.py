"""`sdcourse scan`: exactly the bad pictures are listed, the list is used, and too many of them stop
everything.
"""

import contextlib, errno, io, json, re, resource, shutil, signal, subprocess, sys, tarfile, time

import numpy as np
import pytest
from PIL import Image

from hostile import picture
from nobody import OpenFolder, as_nobody
from test_images import png_claiming
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data import scan as sc, shards as sh
from sdcourse.data.galleries import TarGallery
from sdcourse.data.images import BadImage, image_bytes, open_image
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.dataset import pictures


class Never:
    reason = ""

    def raised(self):
        return False

    def clear_file(self):
        pass


def scene(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def as_file(im, format="PNG", **kwargs):
    out = io.BytesIO()
    im.save(out, format, **kwargs)
    return out.getvalue()


def turned_jpeg():
    note = Image.Exif()
    note[0x0112] = 6
    return as_file(scene(5), "JPEG", exif=note)


CORRUPT = {  # name: (bytes, kind); the list of D6
    "truncated.jpg": (picture()[:-500], "truncated"),
    "zero.png": (b"", "empty"),
    "cmyk.jpg": (picture(seed=2, mode="CMYK"), "cmyk"),
    "page.jpg": (b"<html>", "unreadable"),
    "grey16.png": (
        as_file(Image.fromarray(np.random.default_rng(0).integers(0, 65536, (32, 32), dtype=np.uint16))),
        "deep",
    ),
    "rgb16.png": (png_claiming(4, 4, depth=16), "deep"),
    "liar.png": (picture(seed=3), "suffix"),
    "dot.png": (as_file(Image.new("RGB", (1, 1))), "tiny"),
    "line.png": (as_file(Image.new("RGB", (200, 1))), "tiny"),
    "strip.png": (as_file(Image.new("1", (20_000, 8))), "huge"),
    "bomb.png": (png_claiming(20_000, 20_000), "huge"),
    "float.tif": (as_file(Image.new("F", (8, 8)), "TIFF"), "deep"),
    "copy.png": (as_file(scene(1001)), "duplicate"),
}
ODD = {
    "glass.png": (as_file(scene(6).convert("RGBA")), "alpha"),
    "turned.jpg": (turned_jpeg(), "turned"),
    "grey.jpg": (picture(seed=7, mode="L"), "grey"),
    "few.gif": (as_file(scene(8).convert("P"), "GIF"), "palette"),
}


@pytest.fixture(scope="module")
def museum(tmp_path_factory):
    "30 good pictures, 4 odd ones, and each kind of bad one."
    home = tmp_path_factory.mktemp("museum")
    (home / "train").mkdir()
    for i in range(30):
        (home / f"train/good{i:02}.png").write_bytes(as_file(scene(1000 + i)))
    for name, (data, _) in {**CORRUPT, **ODD}.items():
        (home / "train" / name).write_bytes(data)
    (home / "notes.txt").write_text("no picture")
    (home / "train/good01.png").rename(
        home / "train/a-good01.png"
    )  # its copy comes later in the order of names
    return home


def run(folder, **kwargs):
    return sc.scan(folder, sc.Scan(**kwargs), flag=Never())


# ---- what is found (D6)
def test_exactly_the_bad_ones_are_listed(museum):
    found = run(museum, near_bits=-1)
    assert {b["file"]: b["kind"] for b in found["bad"]} == {
        f"train/{n}": kind for n, (_, kind) in CORRUPT.items()
    }
    assert {o["file"]: o["kind"] for o in found["odd"]} == {
        f"train/{n}": kind for n, (_, kind) in ODD.items()
    }
    assert (
        found["pictures"] == 30 + len(CORRUPT) + len(ODD)
        and found["share"] == len(CORRUPT) / found["pictures"]
    )


def test_what_is_not_listed_opens_and_any_number_of_workers_finds_the_same(museum):
    found = run(museum, workers=1)
    assert found == run(museum, workers=8)
    gone = {b["file"] for b in found["bad"]}
    for p in (museum / "train").iterdir():
        if f"train/{p.name}" not in gone:
            assert open_image(p).mode == "RGB"


def test_limits_are_options(museum):
    kinds = lambda **kw: {b["file"].split("/")[1]: b["kind"] for b in run(museum, near_bits=-1, **kw)["bad"]}
    assert (
        "dot.png" not in kinds(min_side=1)
        and "good00.png" in kinds(min_side=65)
        and "strip.png" not in kinds(max_side=20_000)
        and kinds(max_pixels=4000)["good00.png"] == "huge"
    )


def test_sixteen_bit_tiffs_are_deep(tmp_path):
    (tmp_path / "x.tif").write_bytes(as_file(Image.fromarray(np.zeros((8, 8), np.uint16)), "TIFF"))
    (tmp_path / "y.tif").write_bytes(as_file(scene(1), "TIFF"))
    assert [(b["file"], b["kind"]) for b in run(tmp_path)["bad"]] == [("x.tif", "deep")]


def test_a_held_out_picture_stays_and_its_copy_in_training_goes(tmp_path):
    for split in ("train", "val", "test", "validation"):
        (tmp_path / split).mkdir()
    data = [as_file(scene(i)) for i in range(3)]
    for split, i in (("train", 0), ("val", 0), ("test", 0), ("train", 1), ("validation", 1), ("train", 2)):
        (tmp_path / split / f"{split}{i}.png").write_bytes(data[i])
    (tmp_path / "train/again2.png").write_bytes(data[2])
    assert [(b["file"], b["detail"]) for b in run(tmp_path)["bad"]] == [
        ("train/train0.png", "of test/test0.png"),
        ("train/train1.png", "of validation/validation1.png"),
        ("train/train2.png", "of train/again2.png"),
        ("val/val0.png", "of test/test0.png"),
    ]


# ---- near duplicates
@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_the_quick_search_finds_what_comparing_all_pairs_finds(bits):
    rng = np.random.default_rng(bits)
    values = [int(v) for v in rng.integers(0, 2**64, 60, dtype=np.uint64)]
    for v in values[:40]:  # flips anywhere, also across the borders of the bands
        for places in (1, 2, 3, 4, 7, 8):
            values.append(v ^ sum(1 << int(p) for p in rng.choice(64, places, replace=False)))
    values = list(dict.fromkeys(values))
    brute = [
        (i, j)
        for i in range(len(values))
        for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= bits
    ]
    assert sc._alike(values, bits) == brute and (bits == 0) == (not brute)


def test_scaled_and_recompressed_copies_look_alike_and_others_do_not(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    for i in range(40):
        (tmp_path / f"train/{i}.png").write_bytes(as_file(scene(i)))
    (tmp_path / "test/small.jpg").write_bytes(image_bytes(scene(7).resize((50, 50)), "JPEG"))
    (tmp_path / "train/again.jpg").write_bytes(image_bytes(scene(9), "JPEG"))
    found = run(tmp_path)
    assert (
        found["near"]
        == [
            {"file": "train/7.png", "like": "test/small.jpg", "across": True},
            {"file": "train/again.jpg", "like": "train/9.png", "across": False},
        ]
        and found["bad"] == []
    )
    for drop, want in (("across", ["train/7.png"]), ("all", ["train/7.png", "train/again.jpg"])):
        assert [b["file"] for b in run(tmp_path, drop_near=drop)["bad"]] == want
    assert run(tmp_path, near_bits=-1)["near"] == []


def test_flat_pictures_of_other_colours_do_not_look_alike():
    looks = [sc.look(Image.new("RGB", (16, 16), c)) for c in ("red", "blue", "white", (250, 5, 0), "white")]
    assert {l[0] for l in looks} == {0} and sc.near_duplicates(looks) == {3: 0, 4: 2}


def test_the_hash_asks_left_against_right():
    ramp = np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1))
    rgb = lambda a: Image.fromarray(np.repeat(a[..., None], 3, 2))
    assert sc.look(rgb(ramp))[0] == 0 and sc.look(rgb(ramp[:, ::-1].copy()))[0] == 2**64 - 1


def test_many_flat_pictures_take_no_square_time():
    looks = [(0, 10, 10, 10)] * 200_000
    start = time.process_time()
    assert len(sc.near_duplicates(looks)) == 199_999 and time.process_time() - start < 5


# ---- the list is used
def test_training_data_go_on_without_the_bad_ones(museum, tmp_path):
    "Shards of the museum hold every good and odd picture and no bad one."
    home = tmp_path / "in"
    shutil.copytree(museum, home)
    (home / "train/few.gif").unlink()
    (home / "train/float.tif").unlink()  # tars hold no GIF and no TIFF
    names = sorted(p.name for p in (home / "train").iterdir())
    (home / "train/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n, "text": ""}) + "\n" for n in names)
    )
    assert cli.main(["scan", str(home), "--limit", "0.5"]) == 0
    sh.pack(home, tmp_path / "out", sh.Shards(), flag=Never())
    data = sh.TarSet(tmp_path / "out")
    assert sorted(data.ids) == sorted(n.rsplit(".", 1)[0] for n in names if n not in CORRUPT)
    assert all(data[i]["image"].mode == "RGB" for i in range(len(data)))
    assert (
        verify(
            load_manifest("unsplash-lite")
            | {
                "layouts": {
                    "x": {
                        "what": "x",
                        "others": True,
                        "files": [
                            {"path": "train/metadata.jsonl", "columns": ["text"], "names": "file_name"}
                        ],
                    }
                }
            },
            home,
        )
        == []
    )


@pytest.fixture
def small(tmp_path):
    for i in range(99):
        (tmp_path / f"{i}.png").write_bytes(as_file(scene(i, 8)))
    (tmp_path / "zero.png").touch()
    return tmp_path


def test_the_limit_is_a_share(small, capsys):
    "1 of 100 is 1 %, and no more than 1 %."
    assert cli.main(["scan", str(small)]) == 0 and sc.excluded(small) == {"zero.png"}
    (small / "one.png").touch()
    assert cli.main(["scan", str(small)]) == 1
    assert "more than 1.00%" in capsys.readouterr().out
    with pytest.raises(UserError, match="1.98% of its pictures are bad, more than 1.00%"):
        sc.excluded(small)
    assert cli.main(["scan", str(small), "--limit", "0.02"]) == 0 and sc.excluded(small) == {
        "zero.png",
        "one.png",
    }


def test_a_list_for_other_files_is_refused(small):
    with pytest.raises(UserError, match="was never scanned"):
        sc.excluded(small, required=True)
    assert sc.excluded(small) == frozenset()
    cli.main(["scan", str(small)])
    (small / "notes.txt").write_text("no picture, no change")
    sc.excluded(small)
    for change in (
        lambda: (small / "5.png").write_bytes(b"x"),
        lambda: (small / "5.png").unlink(),
        lambda: (small / "new.png").touch(),
    ):
        change()
        with pytest.raises(UserError, match="changed since it was scanned"):
            sc.excluded(small)


# ---- the command
def test_one_line_for_each_bad_picture(museum, tmp_path, capsys):
    "Case 39: a list that lies elsewhere is not seen by readers, and that is said, with what helps."
    assert cli.main(["scan", str(museum), "--out", str(tmp_path / "list.json"), "--near-bits", "-1"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert (
        len(out) == len(CORRUPT) + 2
        and "empty: train/zero.png (the file has no bytes)" in out
        and "do not see this list; copy it there, or make a folder of your own with links" in out[-2]
        and out[-1].endswith("raise --limit)")
    )
    assert not (museum / "scan.json").exists() and len(
        json.loads((tmp_path / "list.json").read_text())["bad"]
    ) == len(CORRUPT)


def test_a_folder_of_links_is_scanned_and_read(small, tmp_path_factory):
    "Case 39: what a scan of a read-only folder advises works."
    cli.main(["scan", str(small), "--out", str(tmp_path_factory.mktemp("list") / "scan.json")])
    assert not list(small.glob("scan.json*")) and len(pictures(small)) == 100
    mine = tmp_path_factory.mktemp("mine")
    for p in small.iterdir():
        (mine / p.name).symlink_to(p)
    assert cli.main(["scan", str(mine)]) == 0 and len(pictures(mine)) == 99


def test_a_folder_that_nobody_may_write_has_a_remedy(small, monkeypatch, capsys):
    "Case 39: at the first write, which is that of the journal."

    def refuse(journal):
        raise PermissionError(errno.EACCES, "Permission denied", str(journal.path))

    monkeypatch.setattr(sc.Journal, "_open", refuse)
    assert cli.main(["scan", str(small)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Permission denied; make a folder of your own with links" in said


def test_what_looks_alike_is_a_few_lines_and_a_count(tmp_path, capsys):
    "Case 53: twenty lines of each kind; all of them are in the list."
    for i in range(30):
        (tmp_path / f"{i:02}.png").write_bytes(as_file(Image.new("RGB", (16, 16), (200, i // 8, 0))))
        (tmp_path / f"bad{i:02}.png").write_bytes(b"")
    assert cli.main(["scan", str(tmp_path), "--limit", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "scan.json").read_text())
    for word, kind in (("looks alike", "near"), ("empty", "bad"), ("duplicate", "bad")):
        assert sum(line.startswith(word) for line in out) <= 20
    assert f"… and 10 more (empty; all are in {tmp_path}/scan.json)" in out
    near = sum(line.startswith("looks alike") for line in out)
    assert near == min(20, len(found["near"])) and len(found["bad"]) > 50
    assert [b["kind"] for b in found["bad"]].count("empty") == 30


# ---- pictures that are no files of their own
def sample_tar(path, datas):
    "A tar of samples 0, 1, 2 … with captions."
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(datas):
            for name, content in ((f"{i}.png", data), (f"{i}.txt", b"a cat")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    "Ten good samples of train and two of val, one cut, one empty, one that val has too; with an index."
    home = tmp_path / "tars"
    home.mkdir()
    good = [as_file(scene(i, 24)) for i in range(12)]
    sample_tar(home / "train-0.tar", [*good[:10], good[0][:-40], b"", good[10]])
    sample_tar(home / "val-0.tar", good[10:])
    assert sh.index_folder(home, home) == 0
    return home


def test_a_scan_of_tars_is_used_by_readers(tars, capsys, caplog):
    "Case 6: cut and empty members are listed, left out and counted; too many of them stop."
    with pytest.raises(BadImage) as e:
        pictures(tars).image(10)
    command = re.search(r"sdcourse (scan \S+) lists such pictures", str(e.value))[1].split()
    assert cli.main(command) == 1 and "20.00%, more than 1.00%" in capsys.readouterr().out
    with pytest.raises(UserError, match="20.00% of its pictures are bad, more than 1.00%.*higher --limit"):
        pictures(tars)
    assert cli.main([*command, "--limit", "0.2"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "empty: train-0/11 (the file has no bytes)",
        "truncated: train-0/10 (the pixels cannot be read (image file is truncated))",
        "duplicate: train-0/12 (of val-0/0)",
    ]
    data = pictures(tars)
    assert "3 of 13 pictures are bad, as scan.json says; they are left out" in caplog.text
    assert data.ids == [f"train-0/{i}" for i in range(10)] and len(pictures(tars, "val")) == 2
    assert [data.image(i).size for i in (0, 9)] == [(24, 24)] * 2 and data.row(9)["texts"] == ["a cat"]


def test_a_list_for_other_tars_is_refused(tars):
    assert cli.main(["scan", str(tars), "--limit", "0.2"]) == 0
    sample_tar(tars / "train-0.tar", [as_file(scene(99))] * 2)
    sh.index_folder(tars, tars)
    with pytest.raises(UserError, match="changed since it was scanned"):
        pictures(tars)


def test_our_own_tars_are_scanned_by_tar_and_id(tmp_path):
    home = tmp_path / "in"
    for split in ("train", "val"):
        (home / split).mkdir(parents=True)
        for i in range(4):
            data = as_file(scene(i + 10 * (split == "val"), 24))
            (home / split / f"{i}.png").write_bytes(data[:-30] if i == 2 else data)
    sh.pack(home, tmp_path / "out", sh.Shards(), flag=Never())
    assert cli.main(["scan", str(tmp_path / "out"), "--limit", "0.5"]) == 0
    found = json.loads((tmp_path / "out/scan.json").read_text())
    assert [b["file"] for b in found["bad"]] == ["train-00000.tar/2", "val-00000.tar/2"]
    data = pictures(tmp_path / "out", "val")
    assert data.ids == ["0", "1", "3"] and data.bytes(2) == (home / "val/3.png").read_bytes()


def test_a_stopped_scan_of_tars_goes_on(tars, monkeypatch):
    seen, real = [], sc.examine
    monkeypatch.setattr(sc, "examine", lambda picture, cfg: seen.append(1) or real(picture, cfg))
    whole = sc.scan(TarGallery(sh.TarsSet(tars)), sc.Scan(workers=1), flag=Never())
    seen.clear()
    for flag in (After(5), Never()):
        with sc.Journal(tars / "scan.json.partial", sc.Scan(workers=1)) as journal:
            found = sc.scan(TarGallery(sh.TarsSet(tars)), sc.Scan(workers=1), flag=flag, journal=journal)
    assert found == whole and len(seen) == 15


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"bad": 3}', '{"bad": [{"file": 1}], "share": 0, "limit": 1}', "7"]
)
def test_a_list_of_something_else_is_one_line(small, text):
    (small / "scan.json").write_text(text)
    with pytest.raises(UserError, match="scan.json") as e:
        sc.excluded(small)
    assert "\n" not in str(e.value)


def test_a_stop_writes_no_list_and_an_unfinished_one_is_not_used(small, capsys):
    (small / "STOP").touch()
    assert cli.main(["scan", str(small)]) == 0
    assert (
        "stopped (file STOP), there is no list yet" in capsys.readouterr().out
        and not (small / "scan.json").exists()
        and not (small / "STOP").exists()
    )
    with pytest.raises(UserError, match="its scan was stopped"):
        sc.excluded(small)
    assert (
        cli.main(["scan", str(small)]) == 0
        and sc.excluded(small) == {"zero.png"}
        and not (small / "scan.json.partial").exists()
    )


# ---- stopped and continued
class After(Never):
    "Goes up after n questions."

    def __init__(self, n):
        self.n = n

    def raised(self):
        self.n -= 1
        return self.n < 0


def parts(folder, *after, monkeypatch=None, **kwargs):
    "Scan in several starts; (the last result, names in the order in which they were looked at)."
    seen, real = [], sc.examine
    if monkeypatch:
        monkeypatch.setattr(sc, "examine", lambda path, cfg: seen.append(path.name) or real(path, cfg))
    for flag in [*map(After, after), Never()]:
        with sc.Journal(folder.parent / "journal", sc.Scan(workers=1, **kwargs)) as journal:
            found = sc.scan(folder, sc.Scan(workers=1, **kwargs), flag=flag, journal=journal)
    return found, seen


def test_a_stopped_scan_goes_on_and_looks_at_nothing_twice(museum, tmp_path, monkeypatch):
    home = shutil.copytree(museum, tmp_path / "set")
    found, seen = parts(home, 10, 1, 20, monkeypatch=monkeypatch)
    assert json.dumps(found) == json.dumps(run(museum)) and len(seen) == len(set(seen)) == found["pictures"]
    assert parts(home, monkeypatch=monkeypatch)[1] == []


def test_what_changed_meanwhile_is_looked_at_again(museum, tmp_path, monkeypatch):
    home = shutil.copytree(museum, tmp_path / "set")
    assert parts(home)[0] == run(home)
    other, same = home / "train/good05.png", home / "train/good06.png"
    other.write_bytes(other.read_bytes() + b"x")
    time.sleep(0.02)
    same.write_bytes(same.read_bytes())  # as long as before, another time
    (home / "train/new.png").write_bytes(as_file(scene(7000)))
    (home / "train/good07.png").unlink()
    found, seen = parts(home, monkeypatch=monkeypatch)
    assert set(seen) == {"good05.png", "good06.png", "new.png"} and json.dumps(found) == json.dumps(run(home))


def test_a_picture_that_could_not_be_read_is_asked_again(tmp_path):
    "Mended rights leave no trace in size and time."
    with OpenFolder() as folder:
        (folder / "a.png").write_bytes(as_file(scene(1)))
        (folder / "b.png").write_bytes(as_file(scene(2)))
        (folder / "a.png").chmod(0)

        def look():
            with sc.Journal(folder / "journal", sc.Scan()) as journal:
                return [
                    b["file"]
                    for b in sc.scan(folder, sc.Scan(workers=1), flag=Never(), journal=journal)["bad"]
                ]

        assert as_nobody(look) == ["a.png"] and look() == []


def test_a_torn_journal_or_other_limits(museum, tmp_path, monkeypatch):
    home = shutil.copytree(museum, tmp_path / "set")
    parts(home)
    (tmp_path / "journal").write_bytes((tmp_path / "journal").read_bytes()[:-30])
    found, seen = parts(home, monkeypatch=monkeypatch)
    assert len(seen) == 1 and json.dumps(found) == json.dumps(run(home))
    found, seen = parts(home, min_side=65, monkeypatch=monkeypatch)
    assert len(seen) == found["pictures"] and json.dumps(found) == json.dumps(run(home, min_side=65)), (
        "other limits begin anew"
    )
    assert (
        parts(home, min_side=65, limit=0.9, near_bits=-1, drop_near="all", monkeypatch=monkeypatch)[1] == []
    ), "what is counted at the end may change"


def command(folder, *more, **kwargs):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from sdcourse.cli import main; sys.exit(main())",
            "scan",
            str(folder),
            "--workers",
            "2",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def hall(tmp_path_factory):
    "So many pictures that a scan takes seconds."
    home = tmp_path_factory.mktemp("hall")
    big = [as_file(scene(i, 700)) for i in range(6)]
    for i in range(120):
        (home / f"{i:03}.png").write_bytes(big[i % 6] + bytes([i]))
    return home


@pytest.fixture(scope="module")
def listed(hall, tmp_path_factory):
    "The list of an undisturbed scan."
    out = tmp_path_factory.mktemp("listed") / "list.json"
    assert command(hall, "--limit", "1", "--out", str(out)).wait() == 0
    return out.read_bytes()


def lines(folder):
    return (
        (folder / "scan.json.partial").read_bytes().count(b"\n")
        if (folder / "scan.json.partial").exists()
        else 0
    )


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGKILL", "STOP", "deadline"])
def test_whatever_stops_it_the_list_is_the_same(hall, listed, tmp_path, how):
    home = shutil.copytree(hall, tmp_path / "set")
    child = command(home, *(["--max-seconds", "0.3"] if how == "deadline" else []))
    end = time.monotonic() + 250
    while lines(home) < 9 and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    if how == "STOP":
        (home / "STOP").touch()
    elif how != "deadline":
        child.send_signal(getattr(signal, how))
    said, err = child.communicate()
    assert not (home / "scan.json").exists() and not (home / "STOP").exists()
    if how != "SIGKILL":
        assert child.returncode == 0 and "stopped (" in said and err == ""
    kept = lines(home)
    assert command(home, "--limit", "1").wait() == 0 and not (home / "scan.json.partial").exists()
    assert how == "deadline" or 9 <= kept < 121
    assert (home / "scan.json").read_bytes() == listed


def test_no_space_is_one_line_and_there_is_no_list(hall, listed, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    child = command(hall, "--out", str(tmp_path / "list.json"), preexec_fn=limit)
    _, err = child.communicate()
    assert (
        child.returncode == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "limit on file sizes" in err
    ), err
    assert not (tmp_path / "list.json").exists() and not list(tmp_path.glob(".*"))
    assert command(hall, "--limit", "1", "--out", str(tmp_path / "list.json")).wait() == 0
    assert (tmp_path / "list.json").read_bytes() == listed


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere"], "no such folder"),
        (["."], "holds no pictures"),
        ([], "expected FOLDER"),
        ([".", "--limit", "2"], "--limit 2.0"),
        ([".", "--workers=-1"], "--workers -1"),
        ([".", "--near-bits", "9"], "--near-bits"),
        ([".", "--drop-near", "al"], "did you mean 'all'"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["scan", *argv]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ") and err.count("\n") == 1 and words in err and list(tmp_path.iterdir()) == []
    )


def test_what_may_not_be_read(tmp_path):
    "A closed picture is a bad one; a closed folder ends the scan, for nobody knows what is in it."
    with OpenFolder() as folder:
        for i in range(3):
            (folder / f"{i}.png").write_bytes(as_file(scene(i)))
        run(folder)
        (folder / "1.png").chmod(0)
        assert as_nobody(lambda: [(b["file"], b["kind"], b["detail"]) for b in run(folder)["bad"]]) == [
            ["1.png", "unreadable", "Permission denied"]
        ]
        (folder / "closed").mkdir(mode=0)

        def ask():
            try:
                run(folder)
            except UserError as e:
                return str(e)

        assert "unreadable: closed (Permission denied)" in as_nobody(ask)


def test_folders_that_may_not_be_entered_or_written():
    "One line; and no list, no journal."
    with OpenFolder() as folder:
        (folder / "in").mkdir()
        (folder / "in/a.png").write_bytes(as_file(scene(1)))

        def ask(*argv):
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                code = cli.main(["scan", *map(str, argv), "--workers", "1"])
            return [code, said.getvalue()]

        (folder / "in").chmod(0o755)
        code, said = as_nobody(lambda: ask(folder / "in"))
        assert code == 2 and "scan.json.partial: Permission denied" in said and said.count("\n") == 1
        assert (
            as_nobody(lambda: ask(folder / "in", "--out", folder / "list.json")) == [0, ""]
            and (folder / "list.json").is_file()
        )
        (folder / "in").chmod(0)
        for place in ("in", "in/deeper"):
            code, said = as_nobody(lambda: ask(folder / place))
            assert (
                code == 2
                and said.startswith("error: ")
                and said.count("\n") == 1
                and str(folder / place) in said
            )
