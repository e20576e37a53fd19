"""Manifests say what a data set is; `sdcourse verify` says what of it is missing, extra or altered."""

import hashlib, json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest

from nobody import OpenFolder, as_nobody
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data import manifests as m

ROOT = Path(__file__).resolve().parent.parent
DIGITS = m.load_manifest("digits")


def manifest(*files, **layout):
    return DIGITS | {"name": "mine", "layouts": {"here": {"what": "a test", "files": list(files), **layout}}}


def found(folder, *files, **layout):
    "Findings without what stands in brackets."
    return [
        re.sub(r" \(.*", "", line)
        for line in m.verify(m.check_manifest(manifest(*files, **layout), "mine"), folder)
    ]


@pytest.fixture
def folder(tmp_path):
    "A prepared set of three pictures, and the manifest of every byte."
    home = tmp_path / "set"
    (home / "train").mkdir(parents=True)
    for n in "abc":
        (home / f"train/{n}.jpg").write_bytes(n.encode() * 100)
    (home / "train/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": f"{n}.jpg", "text": n}) + "\n" for n in "abc")
    )
    return home


TABLE = {"path": "train/metadata.jsonl", "columns": ["file_name", "text"], "rows": 3, "names": "file_name"}
PICTURES = {"path": "train/*.jpg", "count": 3}


# ---- the manifests of the course
def test_every_data_set_has_a_valid_manifest():
    assert {
        "unsplash-lite",
        "celeba-hq",
        "celeba",
        "imagenet-1k",
        "onepiece-blip-captions",
        "digits",
        "photos",
        "faces",
        "scenes",
        "emoji",
    } <= set(m.shipped())
    for name in m.shipped():
        one = m.check_manifest(m.load_manifest(name), name)
        assert (
            one["name"] == name and one["people"]["note"] and one["licence"]["note"] and one["splits"]["how"]
        )
        known = [n for n in one["splits"]["counts"].values() if n is not None]
        assert len(known) < len(one["splits"]["counts"]) or sum(known) == one["count"], (
            "splits add up to the set"
        )


def test_the_schema_is_a_schema():
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(json.loads((ROOT / "data_manifests/schema.json").read_text()))


def test_digits_are_what_the_manifest_says():
    import sklearn.datasets

    assert m.verify(DIGITS, Path(sklearn.datasets.__file__).parent / "data") == []
    from sdcourse.data.sets.digits import digits

    assert {s: len(digits(s)) for s in ("train", "test")} == DIGITS["splits"]["counts"]


# layout of a shipped manifest, what makes it, what is made from it, and a file to take away; the numbers are
# those of the default options
STEPS = [
    (
        "faces",
        "original",
        "faces OUT --hq-size 32 --min-side 32 --max-side 40",
        "CelebAMask-HQ/CelebA-HQ-img/7.jpg",
    ),
    ("faces", "celeba-hq", "celeba-hq faces-original/CelebAMask-HQ OUT", "train/metadata.jsonl"),
    (
        "faces",
        "celeba",
        "celeba faces-original/CelebA faces-original/CelebAMask-HQ OUT --min-side 36 --size 16",
        "weights.json",
    ),
    ("scenes", "prepared", "scenes OUT --size 24", "test/0000009.png"),
    ("digits", "folders", "digits OUT", "val/d00000000/d00000000_0000.png"),
    ("digits", "prepared", "imagenet digits-folders OUT --size 8", "train/0001/d00000001_0001.png"),
    ("digits", "parquet", "digits OUT --layout parquet", "data/train-00000-of-00001.parquet"),
    ("photos", "tables", "photos OUT --crops 1", "images/temple-0-00.png"),
    ("photos", "prepared", "unsplash photos-tables OUT --size 32", "failures.jsonl"),
    ("emoji", "captions", "emoji OUT --train 20", "failures.jsonl"),
    ("emoji", "table", "emoji OUT --layout table --train 20", "photos.tsv000"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Makes a step once, and what it needs before."
    home, there = tmp_path_factory.mktemp("made"), {}

    def make(name, layout):
        if (name, layout) not in there:
            words = next(w for n, l, w, _ in STEPS if (n, l) == (name, layout))
            for n, l, *_ in STEPS:
                if f" {n}-{l}" in words:
                    make(n, l)
                    words = words.replace(f" {n}-{l}", f" {home / f'{n}-{l}'}")
            there[name, layout] = home / f"{name}-{layout}"
            assert cli.main(["prepare", *words.replace("OUT", str(there[name, layout])).split()]) == 0
        return there[name, layout]

    return make


@pytest.mark.parametrize(
    "name, layout, words, victim", STEPS, ids=lambda x: x if "/" not in x and " " not in x else ""
)
def test_the_shipped_manifest_fits_what_is_prepared(made, tmp_path, name, layout, words, victim):
    if "parquet" in words:
        pytest.importorskip("pyarrow")
    out, manifest = made(name, layout), m.load_manifest(name)
    assert m.pick_layout(manifest, m.walk(out)[0]) == layout and m.verify(manifest, out) == []
    shutil.copytree(out, tmp_path / "o")
    (tmp_path / "o/extra.txt").touch()
    assert "extra: extra.txt" in m.verify(manifest, tmp_path / "o", layout=layout)
    if not (tmp_path / "o" / victim).exists():
        victim = next(p.relative_to(out).as_posix() for p in sorted(out.rglob("*.png")))
    (tmp_path / "o" / victim).unlink()
    assert any(f.startswith("missing: ") for f in m.verify(manifest, tmp_path / "o", layout=layout))


@pytest.mark.parametrize(
    "change, place",
    [
        ({"licence": None}, "licence"),
        ({"extra": 1}, "'extra'"),
        ({"name": "A b"}, "name"),
        ({"people": {"shown": "maybe", "note": "x"}}, "people/shown"),
        ({"count": -1}, "count"),
        ({"source": {"url": "ftp://x", "how": "x"}}, "source/url"),
        ({"layouts": {}}, "layouts"),
        ([], "object"),
    ],
)
def test_a_wrong_manifest_names_the_place(change, place):
    with pytest.raises(UserError) as e:
        m.check_manifest(DIGITS | change if change else change, "mine.json")
    assert str(e.value).startswith("mine.json: ") and place in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a/..", "a\\b", "", ".", "./a"])
def test_paths_that_leave_the_folder_are_no_manifest(path):
    with pytest.raises(UserError, match="files/0/path"):
        m.check_manifest(manifest({"path": path}), "mine")


def test_manifests_are_found_by_name_or_path(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(DIGITS))
    assert m.load_manifest(tmp_path / "x.json") == m.load_manifest("digits")
    for name, words in (
        ("digit", "did you mean 'digits'?"),
        (tmp_path / "y.json", "no such file"),
        ("schema", "no such manifest"),
    ):
        with pytest.raises(UserError) as e:
            m.load_manifest(name)
        assert words in str(e.value)
    (tmp_path / "z.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        m.load_manifest(tmp_path / "z.json")


def test_an_installed_package_carries_the_manifests(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("setup.py", "settings.ini", "README.md", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("sdcourse", "data_manifests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    code = """
from sdcourse.data.manifests import *
import sdcourse
print(sdcourse.__file__, len(shipped()), load_manifest('celeba')['count'])
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "out",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == [
        str(tmp_path / "out/sdcourse/__init__.py"),
        str(len(m.shipped())),
        "202599",
    ], said.stderr
    pictures = tmp_path / "out/sdcourse/pictures"
    listed = m.load_manifest("emoji")["layouts"]["shipped"]["files"]
    assert {p.name: p.stat().st_size for p in pictures.iterdir()} == {e["path"]: e["size"] for e in listed}


# ---- names
@pytest.mark.parametrize(
    "name, good",
    [
        ("a.jpg", True),
        ("train/a b.jpg", True),
        ("-x.png", True),
        ("..a", True),
        ("../a", False),
        ("a/../b", False),
        ("a/..", False),
        ("/a", False),
        ("a//b", False),
        ("C:/a", False),
        ("C:\\a", False),
        ("a\nb", False),
        ("a\0b", False),
        ("", False),
        (".", False),
        ("./a", False),
        ("file:///etc/passwd", False),
    ],
)
def test_names_that_stay_inside(name, good):
    assert m.is_inside(name) == good


# ---- tables
def rows(tmp_path, text):
    (tmp_path / "photos.tsv000").write_text(text, encoding="utf-8", newline="")
    return list(m.tsv_rows(tmp_path / "photos.tsv000"))


def test_a_plain_table(tmp_path):
    assert rows(tmp_path, "\ufeffid\ttext\r\na\tone\r\nb\t\r\n") == [
        (2, {"id": "a", "text": "one"}),
        (3, {"id": "b", "text": ""}),
    ]


def test_an_open_quote_swallows_no_other_row(tmp_path):
    found = rows(tmp_path, "id\ttext\n" + "".join(f'{i}\t"open {i}\n' for i in range(200)) + 'z\tend "x"\n')
    assert [r["id"] for _, r in found] == [*map(str, range(200)), "z"] and found[7][1]["text"] == '"open 7'


def test_quoted_fields_may_hold_lines_and_quotes(tmp_path):
    found = rows(tmp_path, 'id\ttext\tmore\na\t"two\nlines, ""quoted"""\t1\nb\tx\t"last\n\nfield"\nc\ty\t2\n')
    assert [r for _, r in found] == [
        {"id": "a", "text": 'two\nlines, "quoted"', "more": "1"},
        {"id": "b", "text": "x", "more": "last\n\nfield"},
        {"id": "c", "text": "y", "more": "2"},
    ]
    assert [n for n, _ in found] == [2, 4, 7]


def test_characters_that_are_not_utf8_are_said(tmp_path, caplog):
    "Case 18: a table in latin-1; one that holds U+FFFD itself is as it is."
    (tmp_path / "x.tsv").write_bytes("id\ttext\n1\tcafé é\n".encode("latin-1"))
    assert list(m.tsv_rows(tmp_path / "x.tsv")) == [(2, {"id": "1", "text": "caf\ufffd \ufffd"})]
    assert "2 characters are not UTF-8 and become" in caplog.text
    caplog.clear()
    (tmp_path / "x.tsv").write_text("id\ttext\n1\t\ufffd\n", encoding="utf-8")
    assert list(m.tsv_rows(tmp_path / "x.tsv"))[0][1]["text"] == "\ufffd" and not caplog.text
    (tmp_path / "x.tsv").write_text("id\ttext\tid\n1\ta\tb\n")
    with pytest.raises(UserError, match="has the column id twice"):
        list(m.tsv_rows(tmp_path / "x.tsv"))


def test_broken_lines_are_given_as_none(tmp_path):
    found = rows(tmp_path, 'id\ttext\na\tb\tc\nd\ne\t"f\n"g\th\ti\nj\tk\n')
    assert [(n, r and r["id"]) for n, r in found] == [(2, None), (3, None), (4, "e"), (5, None), (6, "j")]


def test_bytes_that_are_no_utf8_are_kept_as_replacement(tmp_path):
    (tmp_path / "x.tsv").write_bytes(b"id\ttext\na\tcaf\xe9\n")
    assert list(m.tsv_rows(tmp_path / "x.tsv")) == [(2, {"id": "a", "text": "caf\ufffd"})]


# ---- verify
def test_a_whole_folder_has_no_findings(folder):
    assert found(folder, *m.inventory(folder), TABLE, PICTURES) == []
    (folder / "manifest.json").write_text("{}")
    (folder / "scan.json").write_text("{}")
    assert found(folder, TABLE, PICTURES) == [], "what this package leaves there is not extra"


def test_every_changed_byte_is_seen(folder):
    files, path = m.inventory(folder), folder / "train/b.jpg"
    for i in (0, 50, 99):
        data = bytearray(b"b" * 100)
        data[i] ^= 1
        path.write_bytes(data)
        assert found(folder, *files) == ["altered: train/b.jpg"]
    path.write_bytes(b"b" * 99)
    assert found(folder, *files) == ["altered: train/b.jpg"]


def test_md5_is_compared_where_it_is_all_there_is(folder):
    want = hashlib.md5(b"a" * 100).hexdigest()
    assert found(folder, {"path": "train/a.jpg", "md5": want}, others=True) == []
    assert found(folder, {"path": "train/a.jpg", "md5": want[::-1]}, others=True) == ["altered: train/a.jpg"]


def test_missing_and_extra_files(folder):
    files = m.inventory(folder)
    (folder / "train/a.jpg").rename(folder / "train/new.jpg")
    assert found(folder, *files) == ["missing: train/a.jpg", "extra: train/new.jpg"]
    assert found(folder, *files, others=True) == ["missing: train/a.jpg"]
    assert found(folder, *({**f, "optional": True} for f in files), others=True) == []


@pytest.mark.parametrize(
    "n, said", [(2, "extra: 1 more than 2 files train/*.jpg"), (4, "missing: 1 of 4 files train/*.jpg")]
)
def test_counts(folder, n, said):
    assert found(folder, {"path": "train/*.jpg", "count": n}, others=True) == [said]


@pytest.mark.parametrize(
    "glob, n",
    [
        ("train/*.jpg", 3),
        ("**/*.jpg", 3),
        ("*.jpg", 0),
        ("train/?.jpg", 3),
        ("train/**", 4),
        ("t*n/a.jpg", 1),
        ("**", 4),
        ("train/[ab].jpg", 0),
    ],
)
def test_globs(folder, glob, n):
    names, _ = m.walk(folder)
    assert len(m._matches({"path": glob}, names)) == n


def test_lines_are_counted(folder):
    (folder / "anno.txt").write_text("3\n\na b\n  \nx 1\n")
    assert found(folder, {"path": "anno.txt", "lines": 3}, others=True) == [] and found(
        folder, {"path": "anno.txt", "lines": 5}, others=True
    ) == ["altered: anno.txt"]


def test_columns_and_rows(folder):
    assert (
        found(folder, {**TABLE, "columns": ["file_name", "caption"]}, PICTURES)[0]
        == "altered: train/metadata.jsonl"
    )
    assert found(folder, {**TABLE, "rows": 4}, PICTURES) == ["altered: train/metadata.jsonl"]
    (folder / "photos.tsv000").write_text("photo_id\tx\na\t1\n")
    (folder / "photos.tsv001").write_text("photo_id\tx\nb\t1\n")
    assert found(folder, {"path": "photos.tsv*", "columns": ["photo_id"], "rows": 2}, others=True) == []
    (folder / "c.csv").write_text('id,t\na,"x,\ny"\n')
    assert found(folder, {"path": "c.csv", "columns": ["id", "t"], "rows": 1}, others=True) == []


def test_a_lacking_column_is_said_once(folder):
    lines = m.verify(manifest({**TABLE, "columns": ["file_name", "caption"]}, PICTURES), folder)
    assert lines == ["altered: train/metadata.jsonl (line 1 has no caption; it has file_name, text …)"]


def test_rows_without_picture_and_pictures_without_row(folder):
    (folder / "train/c.jpg").rename(folder / "train/d.JPG")
    assert found(folder, TABLE, {"path": "train/*.*"}) == ["missing: train/c.jpg", "extra: train/d.JPG"]


def test_hostile_names_in_metadata_are_never_opened(folder):
    (folder.parent / "secret.jpg").write_bytes(b"x")
    names = ["../../secret.jpg", str(folder.parent / "secret.jpg"), "a.jpg", "a.jpg", "b\n.jpg"]
    (folder / "train/metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n, "text": ""}) + "\n" for n in names)
    )
    said = m.verify(manifest({**TABLE, "rows": 5}, PICTURES), folder)
    assert [("outside its folder" in s, "again" in s) for s in said[:4]] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert all("\n" not in s for s in said)


def test_broken_rows_are_counted_and_named(folder):
    (folder / "train/metadata.jsonl").write_text('{"file_name": "a.jpg", "text": ""}\n[1]\n{"file_')
    assert sum("is broken" in s for s in m.verify(manifest(TABLE, PICTURES), folder)) == 2


def test_a_name_with_a_line_break_is_one_line(folder):
    (folder / "train/x\ny.txt").write_text("")
    assert [s for s in m.verify(manifest(TABLE, PICTURES), folder)] == ["extra: 'train/x\\ny.txt'"]


def test_links_to_folders_are_followed_and_circles_are_not(folder):
    (folder / "again").symlink_to(folder, target_is_directory=True)
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere/z.jpg").write_bytes(b"z")
    (folder / "more").symlink_to(folder.parent / "elsewhere", target_is_directory=True)
    (folder / "train/gone.jpg").symlink_to(folder / "nothing")
    names, problems = m.walk(folder)
    assert set(names) == {
        "train/a.jpg",
        "train/b.jpg",
        "train/c.jpg",
        "train/metadata.jsonl",
        "more/z.jpg",
    } and problems == ["unreadable: train/gone.jpg (No such file or directory)"]


def test_an_inventory_uses_known_checksums_and_leaves_itself_out(folder):
    (folder / "manifest.json").write_text("{}")
    files = m.inventory(folder, {"train/a.jpg": "0" * 64})
    assert [f["path"] for f in files] == ["train/a.jpg", "train/b.jpg", "train/c.jpg", "train/metadata.jsonl"]
    assert (
        files[0]["sha256"] == "0" * 64
        and files[1]["sha256"] == hashlib.sha256(b"b" * 100).hexdigest()
        and files[1]["size"] == 100
    )


def test_the_layout_is_the_one_of_which_most_is_there(folder):
    two = DIGITS | {
        "layouts": {
            "tars": {"what": "x", "files": [{"path": "*.tar"}, {"path": "train/*.jpg"}]},
            "pictures": {"what": "x", "files": [TABLE, PICTURES]},
        }
    }
    assert m.verify(two, folder) == [] and "missing: *.tar" in m.verify(two, folder, layout="tars")
    with pytest.raises(UserError, match="did you mean 'tars'"):
        m.verify(two, folder, layout="tarz")


# ---- the command
def run(*argv, capsys):
    code = cli.main(["verify", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command(folder, tmp_path, capsys):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(manifest(TABLE, PICTURES)))
    assert run(path, folder, capsys=capsys) == (0, "mine: complete and unaltered\n", "")
    (folder / "train/b.jpg").unlink()
    assert run(path, folder, "--layout", "here", capsys=capsys) == (
        1,
        "missing: train/b.jpg (line 2 of train/metadata.jsonl)\n"
        "missing: 1 of 3 files train/*.jpg\n"
        "mine: 2 findings\n",
        "",
    )


@pytest.mark.parametrize(
    "argv, words",
    [
        (("nothing", "."), "no such manifest"),
        (("digits",), "expected MANIFEST FOLDER"),
        (("digits", "nowhere"), "nowhere: no such folder"),
        ((), "got nothing"),
        (("digits", ".", "--layot", "x"), "did you mean '--layout'"),
        (("digits", ".", "--layout", "x"), "no such layout"),
    ],
)
def test_a_wrong_question_is_one_line_and_exit_code_2(argv, words, capsys):
    code, out, err = run(*argv, capsys=capsys)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_help(capsys):
    assert (
        cli.main(["verify", "--help"]) == 0
        and "MANIFEST FOLDER" in (page := capsys.readouterr().out)
        and "--layout" in page
    )


def test_what_may_not_be_read_is_a_finding():
    with OpenFolder() as folder:
        for n in "ab":
            (folder / n).write_text(n)
        mine = manifest(*m.inventory(folder), {"path": "closed/x", "optional": True})
        assert m.verify(mine, folder) == []
        (folder / "a").chmod(0)
        (folder / "closed").mkdir(mode=0)
        assert as_nobody(lambda: m.verify(mine, folder)) == [
            "unreadable: closed (Permission denied)",
            "unreadable: a (Permission denied)",
        ]
