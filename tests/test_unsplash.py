"""`sdcourse prepare unsplash` against a server that does everything wrong, hostile tables, a full disk, kills
and stops.
"""

import json, os, resource, signal, subprocess, sys, threading, time
from dataclasses import replace

import pytest

from hostile import JPEG, Patient, hostile_server, picture
from nobody import OpenFolder, as_nobody
from test_images import adobe_rgb, png_claiming
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.images import open_image
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.data.sets import unsplash as u

QUICK = u.Unsplash(
    timeout=1, deadline=3, backoff=0.01, retries=2, workers=4, size=64, max_failed=0.9, max_bytes=2_000_000
)
STOP = threading.Event()


class Never:
    reason = ""

    def raised(self):
        return False

    def clear_file(self):
        pass


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    secret = tmp_path_factory.mktemp("s") / "secret.jpg"
    secret.write_bytes(JPEG)
    with hostile_server(str(secret), png_claiming(60_000, 60_000)) as s:
        yield s


def table(folder, rows, head="photo_id\tphoto_image_url\tai_description"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "photos.tsv000").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return folder


def local_table(folder, n=6, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.jpg").write_bytes(picture(seed=i, **kwargs))
    return table(folder, [f"id-{i}\tfile:{i}.jpg\tpicture {i}" for i in range(n)])


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def rows(folder, split):
    return [json.loads(l) for l in (folder / split / "metadata.jsonl").read_text().splitlines()]


def reasons(folder):
    return {
        f["id"]: f["reason"] for f in map(json.loads, (folder / "failures.jsonl").read_text().splitlines())
    }


def photo(url, name="a"):
    return u.Photo(name, url, "", name, "")


# ---- one photo from a hostile server
@pytest.mark.parametrize(
    "path, asked",
    [("good", 1), ("nolength", 1), ("moved", 1), ("cutonce", 2), ("busy", 3), ("limited", 2), ("slow", 1)],
)
def test_failures_that_pass_are_tried_again(server, path, asked):
    before = server.asked[f"/{path}"]
    data, suffix, size = u.get_photo(photo(f"{server.url}/{path}"), ".", replace(QUICK, size=0), STOP)
    assert (
        data == JPEG and suffix == ".jpg" and size == (120, 80) and server.asked[f"/{path}"] - before == asked
    )


@pytest.mark.parametrize(
    "path, words",
    [
        ("cut", "bytes, 3 attempts"),
        ("long", "bytes, 3 attempts"),
        ("short", "truncated"),
        ("broken", "HTTP 500, 3 attempts"),
        ("empty", "empty: the file has no bytes, 3 attempts"),
        ("garbage", "3 attempts"),
        ("hangup", "3 attempts"),
        ("oddlength", "3 attempts"),
    ],
)
def test_patience_ends(server, path, words):
    with pytest.raises(u.Failed) as e:
        u.get_photo(photo(f"{server.url}/{path}"), ".", QUICK, STOP)
    assert words in str(e.value) and server.asked[f"/{path}"] == 3


@pytest.mark.parametrize(
    "path, words",
    [
        ("gone", "HTTP 404"),
        ("html", "HTML"),
        ("bomb", "huge"),
        ("huge", "2,000,000 bytes"),
        ("endless", "2,000,000 bytes"),
        ("circle", "more than 10 redirects"),
        ("tofile", "cannot be asked"),
        ("toftp", "cannot be asked"),
        ("tosocket", "cannot be asked"),
        ("endlessmove", "2,000,000 bytes"),
    ],
)
def test_failures_that_stay_are_not_tried_again(server, path, words):
    before = server.asked[f"/{path}"]
    with pytest.raises(u.Failed) as e:
        u.get_photo(photo(f"{server.url}/{path}"), ".", QUICK, STOP)
    assert words in str(e.value) and (path == "circle" or server.asked[f"/{path}"] - before == 1)


@pytest.mark.parametrize(
    "path, words, most",
    [("stall", "silent", 3), ("stallhalf", "silent", 3), ("drip", "not there after 1.5", 4)],
)
def test_no_server_holds_an_attempt_for_ever(server, path, words, most):
    "The drip sends a byte every 50 ms: no silence, so only the deadline ends it."
    start = time.monotonic()
    with pytest.raises(u.Failed, match=words):
        u.get_photo(photo(f"{server.url}/{path}"), ".", replace(QUICK, retries=0, deadline=1.5), STOP)
    assert time.monotonic() - start < most + 5


@pytest.mark.parametrize(
    "url, words",
    [
        ("http://127.0.0.1:1/x", "no connection"),
        ("http://[::1/x", "cannot be asked"),
        ("http:///x", "cannot be asked"),
        ("http://127.0.0.1:99999/x", "cannot be asked|no connection|unexpected"),
        ("http://a b/x", "cannot be asked|no connection"),
        ("file:../x", "outside"),
        ("file:///no/such", "cannot be read"),
        ("file:a%00b", "outside"),
        ("file://[x/y", "cannot be read"),
    ],
)
def test_addresses_that_lead_nowhere(tmp_path, url, words):
    with pytest.raises(u.Failed, match=words):
        u.get_photo(photo(url), tmp_path, replace(QUICK, retries=0), STOP)


def test_waiting_grows_and_ends_with_a_stop(server, monkeypatch):
    class Event(threading.Event):
        waits = []

        def wait(self, s):
            self.waits.append(s)
            return len(self.waits) >= 4

    event = Event()
    with pytest.raises(u.Failed, match="stopped"):
        u.get_photo(photo(f"{server.url}/broken/2"), ".", replace(QUICK, retries=9, backoff=0.5), event)
    assert event.waits == [0.5, 1, 2, 4]


def test_the_server_may_ask_for_a_longer_wait(server):
    start = time.monotonic()
    server.asked["/limited/2"] = 0
    u.get_photo(photo(f"{server.url}/limited/2"), ".", QUICK, STOP)
    assert time.monotonic() - start >= 1


# ---- kept connections
def test_connections_are_kept(tmp_path):
    with hostile_server(handler=Patient) as s:
        folder = table(tmp_path / "in", [f"i{i}\t{s.url}/good/{i}\tt" for i in range(40)])
        assert u.prepare_unsplash(folder, tmp_path / "out", QUICK, flag=Never())
        assert s.asked.total() == 40 and s.connections <= QUICK.workers


def test_a_redirect_and_a_cut_answer_on_a_kept_connection(tmp_path):
    "What an answer left behind never becomes a part of the next one."
    with hostile_server(handler=Patient) as s:
        lines = [
            f"i{i}\t{s.url}/{['good', 'moved', 'cut', 'gone', 'cutonce'][i % 5]}/{i}\tt" for i in range(30)
        ]
        assert u.prepare_unsplash(
            table(tmp_path / "in", lines), tmp_path / "out", replace(QUICK, size=0), flag=Never()
        )
    stored = [p.read_bytes() for p in (tmp_path / "out").rglob("*.jpg")]
    assert len(stored) == 18 and set(stored) == {JPEG} and len(reasons(tmp_path / "out")) == 12


def test_no_cookies(server):
    with u.connections(QUICK) as client:
        before = len(server.cookies)
        for i in range(2):
            u.fetch(f"{server.url}/cookie/{i}", QUICK, STOP, client)
    assert server.cookies[before:] == [None, None]


def test_the_proxy_of_the_environment(server, monkeypatch):
    "Asked for every address but those of NO_PROXY; one that cannot be used is one line."
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert u.fetch("http://far.invalid/good/by-proxy", QUICK, STOP) == JPEG
    with pytest.raises(u.Again, match="no connection"):
        u.fetch("http://127.0.0.1:1/x", QUICK, STOP)
    monkeypatch.setenv("http_proxy", "gopher://127.0.0.1:1")
    with pytest.raises(UserError, match="the proxy of this environment cannot be used") as e:
        u.connections(QUICK)
    assert "\n" not in str(e.value)


# ---- what is stored
def test_a_picture_that_is_right_is_kept_byte_for_byte():
    for data in (JPEG, picture(format="PNG"), picture(format="WEBP")):
        assert u.as_stored(data, 80)[0] == data and u.as_stored(data, 0)[0] == data


def test_other_pictures_are_made_right():
    turned = picture(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    for data, size, want in (
        (JPEG, 40, (60, 40)),
        (picture(mode="CMYK"), 0, (120, 80)),
        (picture(mode="L", format="PNG"), 0, (120, 80)),
        (turned, 0, (80, 120)),
        (picture(format="BMP"), 0, (120, 80)),
    ):
        stored, suffix, sides = u.as_stored(data, size)
        im = open_image(stored)
        assert (
            im.size == want == sides
            and stored != data
            and suffix == (".png" if data[:2] in (b"\x89P", b"BM") else ".jpg")
        )


def test_lossless_stays_lossless():
    assert (
        open_image(u.as_stored(picture(format="BMP"), 0)[0]).tobytes()
        == open_image(picture(format="BMP")).tobytes()
    )


@pytest.mark.parametrize(
    "sides, url, want",
    [
        ((6000, 4000), "http://x/a", "http://x/a?h=512&fm=jpg&q=90"),
        ((4000, 6000), "http://x/a?b=1", "http://x/a?b=1&w=512&fm=jpg&q=90"),
        ((), "http://x/a", "http://x/a?w=1024&fm=jpg&q=90"),
        ((500, 900), "http://x/a", "http://x/a"),
    ],
)
def test_the_server_is_asked_for_the_size(sides, url, want):
    assert u.address(replace(photo(url), sides=sides), u.Unsplash()) == want
    assert (
        u.address(replace(photo(url), sides=sides), u.Unsplash(query=""))
        == u.address(replace(photo(url), sides=sides), u.Unsplash(size=0))
        == url
    )


# ---- tables
def read(tmp_path, rows_, **kwargs):
    return u.read_photos(table(tmp_path, rows_, **kwargs), u.Unsplash())


@pytest.mark.parametrize(
    "name", ["a/b", "../x", "..", ".hidden", "a\\b", "", " ", "a b", "x" * 201, "a\u202eb", "con:x"]
)
def test_ids_that_cannot_be_file_names_are_listed(tmp_path, name):
    photos, failures = read(tmp_path, [f"{name}\thttp://x/1\tt", "ok\thttp://x/2\tt"])
    assert [p.id for p in photos] == ["ok"] and [f["where"] for f in failures] == ["photos.tsv000:2"]


@pytest.mark.parametrize("name", ["-aB_1", "__x", "A", "0", "a.b"])
def test_ids_are_kept_as_they_are(tmp_path, name):
    assert read(tmp_path, [f"{name}\thttp://x/1\tt"])[0][0].id == name


def test_quotes_broken_lines_and_duplicates(tmp_path):
    photos, failures = read(
        tmp_path,
        [
            'a\thttp://x/1\t"one',
            'b\thttp://x/2\tsay "two"',
            "b\thttp://x/3\tagain",
            "B\thttp://x/4\tcase",
            "short",
            "c\tftp://x/5\tt",
            "d\tjavascript:x\tt",
            "e\thttp://x/6\t a \t\tx",
        ],
    )
    assert [(p.id, p.text) for p in photos] == [("a", '"one'), ("b", 'say "two"')]
    assert [f["where"].split(":")[1] for f in failures] == ["4", "5", "6", "7", "8", "9"]


def test_missing_columns_are_named(tmp_path):
    for head, words in (
        ("photo_id\tphoto_url\tai_description", "photo_image_url; did you mean 'photo_url'"),
        ("id\tphoto_image_url\tai_description", "photo_id"),
        ("photo_id\tphoto_image_url\tdescription", "ai_description.*--text-column"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path, ["a\tb\tc"], head=head)


@pytest.mark.parametrize(
    "text",
    ["", "photo_id\tphoto_image_url\tai_description\n", "photo_id\tphoto_image_url\tai_description\nx\n"],
)
def test_an_empty_table_is_an_error(tmp_path, text):
    (tmp_path / "photos.tsv000").write_text(text)
    with pytest.raises(UserError, match="no usable row"):
        u.read_photos(tmp_path, u.Unsplash())


def test_a_folder_without_tables(tmp_path):
    for folder, words in ((tmp_path, "holds no photos.tsv000"), (tmp_path / "x", "No such file")):
        with pytest.raises(UserError, match=words):
            u.read_photos(folder, u.Unsplash())


def test_a_folder_that_may_not_be_read():
    with OpenFolder() as folder:
        table(folder / "in", ["a\thttp://x/1\tt"]).chmod(0)

        def ask():
            try:
                u.read_photos(folder / "in", u.Unsplash())
            except UserError as e:
                return str(e)

        assert "in: cannot be read (Permission denied)" in as_nobody(ask)


def test_all_parts_of_the_table_are_read(tmp_path):
    table(tmp_path, ["a\thttp://x/1\tt"])
    (tmp_path / "photos.tsv001").write_text("ai_description\tphoto_id\tphoto_image_url\nt\tb\thttp://x/2\n")
    (tmp_path / "photos.tsv.bak").write_text("x")
    assert [p.id for p in u.read_photos(tmp_path, u.Unsplash())[0]] == ["a", "b"]


def test_an_empty_caption_falls_back_to_the_photographers(tmp_path):
    head = "photo_id\tphoto_image_url\tai_description\tphoto_description"
    assert [
        p.text
        for p in read(
            tmp_path, ["a\thttp://x\t\tby hand", "b\thttp://x\tby machine\tx", "c\thttp://x\t\t"], head=head
        )[0]
    ] == ["by hand", "by machine", ""]


# ---- splits
def test_photographers_are_in_one_split_and_order_does_not_matter():
    photos = [u.Photo(f"p{i}", "file:x", "", f"g{i % 97}", "") for i in range(2000)]
    one = u.assign_splits(photos, u.Unsplash())
    assert one == u.assign_splits(photos[::-1], u.Unsplash()) != u.assign_splits(photos, u.Unsplash(seed=1))
    assert all(len({one[p.id] for p in photos if p.group == f"g{g}"}) == 1 for g in range(97))
    count = [list(one.values()).count(s) for s in u.SPLITS]
    assert sum(count) == 2000 and 80 <= count[1] <= 101 and 80 <= count[2] <= 101


def test_the_group_is_the_photographer(tmp_path):
    head = "photo_id\tphoto_image_url\tai_description\tphotographer_username"
    assert [
        p.group
        for p in read(
            tmp_path, ["a\thttp://x\tt\tann", "b\thttp://x\tt\tann", "c\thttp://x\tt\t"], head=head
        )[0]
    ] == ["ann", "ann", "c"]


def test_a_split_column_decides(tmp_path):
    head = "photo_id\tphoto_image_url\tai_description\tsplit"
    photos, failures = read(
        tmp_path,
        ["a\thttp://x\tt\ttest", "b\thttp://x\tt\ttrain", "c\thttp://x\tt\tdev", "d\thttp://x\tt\t"],
        head=head,
    )
    got = u.assign_splits(photos, u.Unsplash(val_share=0, test_share=0))
    assert got == {"a": "test", "b": "train", "d": "train"} and "dev" in failures[0]["reason"]


# ---- all of it
def test_a_hostile_server_leaves_a_whole_set_and_a_full_report(server, tmp_path):
    bad = {
        "cutpng": "truncated",
        "gone": "HTTP 404",
        "html": "HTML",
        "bomb": "huge",
        "cut": "bytes",
        "stall": "silent",
        "huge": "bytes",
        "circle": "redirect",
    }
    good = ["good/1", "nolength", "moved", "cmyk", "png", "slow"]
    lines = [f"{p.replace('/', '-')}\t{server.url}/{p}\tabout {p}" for p in [*bad, *good]] + [
        "x/y\thttp://x\tt"
    ]
    before = threading.active_count()
    assert u.prepare_unsplash(table(tmp_path / "in", lines), tmp_path / "out", QUICK, flag=Never())
    out = tmp_path / "out"
    found = {r["id"]: r for s in u.SPLITS if (out / s).exists() for r in rows(out, s)}
    assert (
        set(found) == {p.replace("/", "-") for p in good}
        and found["png"]["file_name"] == "png.png"
        and found["moved"]["text"] == "about moved"
    )
    assert set(reasons(out)) == {*bad, "x/y"} and all(w in reasons(out)[p] for p, w in bad.items())
    assert verify(load_manifest(out / "manifest.json"), out) == [] and not (tmp_path / "out.partial").exists()
    assert all(
        min(open_image(out / s / r["file_name"]).size) <= 64
        for s in u.SPLITS
        if (out / s).exists()
        for r in rows(out, s)
    )
    assert threading.active_count() <= before + 4


def test_what_pillow_cannot_do_is_the_fault_of_that_photo(tmp_path, monkeypatch):
    as_stored = u.as_stored

    def odd(data, size):
        if data == picture(seed=2):
            raise OSError("encoder error -2 when writing image file")
        return as_stored(data, size)

    monkeypatch.setattr(u, "as_stored", odd)
    assert u.prepare_unsplash(local_table(tmp_path / "in"), tmp_path / "out", QUICK, flag=Never())
    assert reasons(tmp_path / "out") == {
        "id-2": "cannot be converted (encoder error -2 when writing image file)"
    }


def test_names_are_relative_and_nothing_holds_an_absolute_path(tmp_path):
    u.prepare_unsplash(local_table(tmp_path / "in"), tmp_path / "out", QUICK, flag=Never())
    for name, data in tree(tmp_path / "out").items():
        if name.endswith(("json", "jsonl")):
            assert str(tmp_path).encode() not in data, name
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert verify(load_manifest(tmp_path / "elsewhere/manifest.json"), tmp_path / "elsewhere") == []


def test_two_runs_and_any_number_of_workers_write_the_same_bytes(tmp_path):
    folder = local_table(tmp_path / "in", 12)
    for n, workers in enumerate((1, 4, 4)):
        u.prepare_unsplash(folder, tmp_path / f"out{n}", replace(QUICK, workers=workers), flag=Never())
    assert (
        tree(tmp_path / "out0") == tree(tmp_path / "out1") == tree(tmp_path / "out2")
        and len(tree(tmp_path / "out0")) >= 15
    )


def test_too_many_failures_publish_nothing_and_a_second_run_tries_them_again(tmp_path, capsys):
    folder, cfg = local_table(tmp_path / "in", 10), replace(QUICK, max_failed=0.1)
    for i in (3, 7):
        (folder / f"{i}.jpg").rename(folder / f"{i}.away")
    with pytest.raises(UserError, match="2 of 10 photos failed, more than --max-failed 0.1"):
        u.prepare_unsplash(folder, tmp_path / "out", cfg, flag=Never())
    assert (
        not (tmp_path / "out").exists()
        and "2 failed: the file cannot be read" in capsys.readouterr().out
        and set(reasons(tmp_path / "out.partial")) == {"id-3", "id-7"}
    )
    (folder / "3.away").rename(folder / "3.jpg")
    assert u.prepare_unsplash(folder, tmp_path / "out", cfg, flag=Never())
    assert (
        set(reasons(tmp_path / "out")) == {"id-7"}
        and sum(len(rows(tmp_path / "out", s)) for s in u.SPLITS) == 9
    )


def test_nothing_is_got_twice(server, tmp_path):
    folder = table(tmp_path / "in", [f"i{i}\t{server.url}/good/twice{i}\tt" for i in range(5)])

    class Soon(Never):
        reason = "test"

        def raised(self):
            return sum(server.asked[f"/good/twice{i}"] for i in range(5)) >= 3

    assert (
        u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, workers=1), flag=Soon()) is False
        and not (tmp_path / "out").exists()
    )
    kept = [p.stem for p in (tmp_path / "out.partial").rglob("*.jpg")]
    assert len(kept) >= 2
    u.prepare_unsplash(folder, tmp_path / "out", QUICK, flag=Never())
    assert (
        all(server.asked[f"/good/twice{i[1:]}"] == 1 for i in kept)
        and sum(len(rows(tmp_path / "out", s)) for s in u.SPLITS if (tmp_path / "out" / s).exists()) == 5
    )


def test_a_stored_file_that_became_shorter_is_got_again(tmp_path):
    folder = local_table(tmp_path / "in", 10)
    (folder / "7.jpg").rename(folder / "away")
    with pytest.raises(UserError, match="1 of 10 photos failed"):
        u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, max_failed=0), flag=Never())
    short = next((tmp_path / "out.partial").rglob("id-2.jpg"))
    short.write_bytes(short.read_bytes()[:100])
    (folder / "away").rename(folder / "7.jpg")
    assert u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, max_failed=0), flag=Never())
    assert open_image(next((tmp_path / "out").rglob("id-2.jpg"))).size == (96, 64)


def test_another_size_or_another_table_is_refused(tmp_path):
    folder = local_table(tmp_path / "in")
    u.prepare_unsplash(folder, tmp_path / "out", QUICK, flag=Never())
    assert u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, workers=1, timeout=9), flag=Never())
    with pytest.raises(UserError, match="size: 64 -> 32"):
        u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, size=32), flag=Never())
    local_table(tmp_path / "in", 7)
    with pytest.raises(UserError, match="tables"):
        u.prepare_unsplash(folder, tmp_path / "out", QUICK, flag=Never())


def test_files_that_a_killed_start_left_are_not_in_the_set(tmp_path):
    folder = local_table(tmp_path / "in", 10)
    (folder / "7.jpg").rename(folder / "away")
    with pytest.raises(UserError, match="1 of 10 photos failed"):
        u.prepare_unsplash(folder, tmp_path / "out", replace(QUICK, max_failed=0), flag=Never())
    split = next((tmp_path / "out.partial").rglob("id-2.jpg")).parent
    (split / "id-2.png").write_bytes(b"old")
    (split / "metadata.jsonl").write_text("{}")
    u.prepare_unsplash(folder, tmp_path / "out", QUICK, flag=Never())
    assert (
        not list((tmp_path / "out").rglob("id-2.png"))
        and verify(load_manifest("unsplash-lite"), tmp_path / "out", layout="prepared") == []
    )


def test_hugging_face_reads_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    u.prepare_unsplash(local_table(tmp_path / "in", 30), tmp_path / "out", QUICK, flag=Never())
    got = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    assert set(got) == {"train", "validation", "test"} and sum(map(len, got.values())) == 30
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        want = {r["id"]: r for r in rows(tmp_path / "out", name)}
        for item in got[split]:
            assert item["text"] == want[item["id"]]["text"] and item["image"].size == (96, 64)


# ---- processes
def command(folder, out, *more, **kwargs):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from sdcourse.cli import main; sys.exit(main())",
            "prepare",
            "unsplash",
            str(folder),
            str(out),
            "--size",
            "64",
            "--workers",
            "2",
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def wait_for(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    "Forty photos, 0.3 seconds each; two of them never answer."
    with hostile_server() as s:
        folder = table(
            tmp_path_factory.mktemp("slow"),
            [f"i{i}\t{s.url}/{'stall' if i in (5, 6) else 'slow'}/{i}\tt" for i in range(40)],
        )
        yield folder, s


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "STOP file", "deadline"])
def test_a_stop_keeps_what_is_done_and_exits_with_0(slow, tmp_path, how):
    "Also while a server is silent: the stop does not wait for its time limit."
    folder, server = slow
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    child = command(
        folder,
        out,
        "--timeout",
        "300",
        "--deadline",
        "300",
        *(["--max-seconds", "3"] if how == "deadline" else []),
    )
    wait_for(lambda: len(list(partial.rglob("*.jpg"))) >= 5)
    start = time.monotonic()
    if how == "STOP file":
        (partial / "STOP").touch()
    elif how != "deadline":
        child.send_signal(getattr(signal, how))
    said, err = child.communicate(timeout=60)
    assert (
        child.returncode == 0
        and f"stopped ({'file STOP' if how == 'STOP file' else how})" in said
        and err == ""
        and time.monotonic() - start < 15
    )
    kept = {p.name for p in partial.rglob("*.jpg")}
    journal = {
        json.loads(l)["file"].split("/")[1]
        for l in (partial / "done.jsonl").read_text().splitlines()
        if l.strip()
    }
    assert (
        kept == journal
        and not out.exists()
        and not list(partial.rglob(".*.tmp"))
        and not (partial / "STOP").exists()
    )


@pytest.mark.timeout(150)
def test_kill_nine_at_any_moment_ends_with_the_same_bytes(tmp_path):
    folder = local_table(tmp_path / "in", 60, w=700, h=500)
    u.prepare_unsplash(folder, tmp_path / "want", replace(QUICK, max_failed=0.05, workers=1), flag=Never())
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    for n in (3, 15, 30):
        child = command(folder, out)
        wait_for(lambda: len(list(partial.rglob("*.jpg"))) >= n)
        child.kill()
        child.communicate()
        assert not out.exists()
    assert command(folder, out).wait() == 0
    assert tree(out) == tree(tmp_path / "want")


@pytest.mark.timeout(120)
def test_no_space_is_one_line_and_nothing_looks_whole(tmp_path):
    folder, out = local_table(tmp_path / "in", 8, w=300, h=300), tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
    child = command(folder, out, "--max-failed", "0.9", preexec_fn=limit)
    _, err = child.communicate(timeout=60)
    assert (
        child.returncode == 2
        and err.count("\n") == 1
        and err.startswith("error: ")
        and "limit on file sizes" in err
    ), err
    assert not out.exists() and not [
        p for p in (tmp_path / "out.partial").rglob("*") if p.suffix in (".jpg", ".tmp")
    ]
    assert command(folder, out).wait() == 0 and len(list(out.rglob("*.jpg"))) == 8


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "expected TSV_FOLDER OUT"),
        (["in", "out", "--sizes", "3"], "did you mean '--size'"),
        (["in", "out", "--workers", "0"], "--workers 0: must be greater than 0"),
        (["in", "out", "--val-share", "0.6", "--test-share", "0.5"], "together"),
        (["nowhere", "out"], "nowhere: cannot be read"),
        (["in", "out", "--max-failed", "1"], "--max-failed 1.0"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", "unsplash", *argv]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.startswith("error: ")
        and err.count("\n") == 1
        and words in err
        and list(tmp_path.iterdir()) == []
    )


def test_a_photo_that_comes_after_the_stop_is_not_stored(tmp_path, monkeypatch):
    "Nobody would write it into the journal."
    stop, one = threading.Event(), replace(photo("http://x/late"), split="train")
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(u, "fetch", lambda *_: JPEG)
    assert u._far(QUICK, tmp_path, stop, None, None, one)["file"] == "train/a.jpg"
    (tmp_path / "train/a.jpg").unlink()
    stop.set()
    with pytest.raises(u.Stopped):
        u._far(QUICK, tmp_path, stop, None, None, one)
    assert not list((tmp_path / "train").iterdir())


# ---- what never ends, and what must not be lost
def test_pipes_and_devices_are_failures_of_their_photos(tmp_path):
    os.mkfifo(tmp_path / "ff")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, words in (("zero", "no plain file"), ("ff", "no plain file")):
        with pytest.raises(u.Failed, match=words):
            u.get_photo(photo(f"file:{name}"), tmp_path, u.Unsplash(retries=0), threading.Event())


def test_the_table_of_the_lite_archive_by_its_other_name(tmp_path):
    table(tmp_path, ["a\tfile:a.png\ta cat"])
    (tmp_path / "photos.tsv000").rename(tmp_path / "photos.csv000")
    assert [p.id for p in u.read_photos(tmp_path, u.Unsplash())[0]] == ["a"]


def test_colours_are_converted_before_their_profile_is_dropped():
    data = picture(icc_profile=adobe_rgb())
    before = open_image(data)
    for size in (0, 40):
        stored, _, sides = u.as_stored(data, size)
        after = open_image(stored)
        assert b"ICC_PROFILE" not in stored
        a, b = (im.resize((1, 1)).getpixel((0, 0)) for im in (before, after))
        assert max(abs(x - y) for x, y in zip(a, b)) <= 3


def test_a_table_that_names_a_pipe_and_a_device_is_prepared_without_them(tmp_path, capsys):
    "Case 57: it waited for ever and filled the memory."
    local_table(tmp_path / "in", 6)
    os.mkfifo(tmp_path / "in/ff")
    with open(tmp_path / "in/photos.tsv000", "a") as table_:
        table_.write("pipe\tfile:ff\tx\nzero\tfile:///dev/zero\ty\n")
    words = ["prepare", "unsplash", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert cli.main([*words, "--max-failed", "0.5"]) == 0
    said = capsys.readouterr()
    assert "2 failed: the file cannot be read (no plain file)" in said.out + said.err
    assert sum(len(rows(tmp_path / "out", split)) for split in ("train", "val", "test")) == 6
