"""Tars with an index: the same bytes every time, each sample found by its id and seen once, hostile tars
refused.
"""

import gzip, io, json, os, pickle, re, resource, shutil, subprocess, sys, tarfile, time
from collections import Counter
from pathlib import Path

import pytest
import torch

from hostile import picture
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data import shards as sh
from sdcourse.data.images import open_image
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.dataset import pictures, splits


class Never:
    reason = ""

    def raised(self):
        return False

    def clear_file(self):
        pass


def data_folder(folder, n=20, formats=("JPEG", "PNG", "WEBP"), split="train", w=40):
    "A prepared folder with odd ids and pictures of several formats."
    home = folder / split
    home.mkdir(parents=True)
    lines = []
    for i in range(n):
        name = f"x{i}.{dict(JPEG='jpg', PNG='png', WEBP='webp')[formats[i % len(formats)]]}"
        (home / name).write_bytes(picture(w, 30, seed=i, format=formats[i % len(formats)]))
        lines.append(
            json.dumps(
                {
                    "file_name": name,
                    "id": ["-aB", "a.b", "n01/x"][i % 3] + f"_{i}",
                    "text": f"über {i}",
                    "label": i % 5,
                },
                ensure_ascii=False,
            )
        )
    (home / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rows(folder, split="train"):
    return [
        json.loads(l) for l in (folder / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def tree(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "(data folder, its tars): 20 train and 7 val samples in several tars."
    home = tmp_path_factory.mktemp("packed")
    folder = data_folder(data_folder(home / "in", 20), 7, split="val")
    assert sh.pack(folder, home / "out", sh.Shards(max_bytes=20_480), flag=Never()) == 0
    return folder, home / "out"


# ---- writing
def test_every_sample_comes_back_as_it_was(packed):
    folder, out = packed
    for split in ("train", "val"):
        data = sh.TarSet(out, split)
        assert data.ids == [r["id"] for r in rows(folder, split)]
        for i, r in enumerate(rows(folder, split)):
            item = data[i]
            assert (item["id"], item["text"], item["label"]) == (r["id"], r["text"], r["label"])
            assert (
                data.read(i) == (folder / split / r["file_name"]).read_bytes()
                and item["image"].tobytes() == open_image(folder / split / r["file_name"]).tobytes()
            )
    assert len(sh.TarSet(out)) == 27 and data[-1]["id"] == data.ids[-1]
    with pytest.raises(IndexError):
        data[7]


def test_tars_are_bounded_and_there_are_several(packed):
    sizes = [p.stat().st_size for p in packed[1].glob("*.tar")]
    assert len(sizes) >= 6 and max(sizes) <= 20_480 and sum(sizes) / len(sizes) > 10_000


def test_the_same_bytes_every_time(packed, tmp_path):
    folder, out = packed
    time.sleep(1.1)  # a time in a header would show
    for p in (folder / "train").iterdir():
        os.utime(p)
    sh.pack(folder, tmp_path / "again", sh.Shards(max_bytes=20_480), flag=Never())
    assert tree(tmp_path / "again") == tree(out)


def test_headers_say_nothing_of_this_machine(packed):
    with tarfile.open(next(packed[1].glob("*.tar"))) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_the_folder_describes_itself(packed):
    _, out = packed
    assert (
        verify(load_manifest(out / "manifest.json"), out) == []
        and load_manifest(out / "manifest.json")["licence"]["name"] == "not recorded"
    )
    assert {p.suffix for p in out.iterdir()} == {".tar", ".jsonl", ".json"}


def test_the_origin_is_carried_over(tmp_path):
    folder = data_folder(tmp_path / "in", 3)
    (folder / "manifest.json").write_text(json.dumps(load_manifest("digits")))
    sh.pack(folder, tmp_path / "out", sh.Shards(), flag=Never())
    assert load_manifest(tmp_path / "out/manifest.json")["licence"] == load_manifest("digits")["licence"]


def test_webdataset_reads_them(packed):
    wds = pytest.importorskip("webdataset")
    folder, out = packed
    got = list(wds.WebDataset(sorted(map(str, out.glob("train-*.tar"))), shardshuffle=False))
    want = rows(folder)
    assert len(got) == 20
    for sample, r in zip(got, want):
        suffix = r["file_name"].split(".")[1]
        assert (
            sample["__key__"] == sh.key_of(r["id"])
            and sample[suffix] == (folder / "train" / r["file_name"]).read_bytes()
            and json.loads(sample["json"])["text"] == r["text"]
        )


def test_plain_tar_reads_them(packed, tmp_path):
    subprocess.run(
        ["tar", "-xf", str(next(packed[1].glob("train-00000.tar"))), "-C", str(tmp_path)],
        check=True,
        timeout=60,
    )
    assert (tmp_path / "-aB_0.jpg").read_bytes() == (packed[0] / "train/x0.jpg").read_bytes()


def test_a_sample_larger_than_a_tar_is_refused_before_anything_is_written(tmp_path):
    folder = data_folder(tmp_path / "in", 3)
    with pytest.raises(UserError, match="--max-bytes"):
        sh.pack(folder, tmp_path / "out", sh.Shards(max_bytes=10_000), flag=Never())
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda f: (f / "train/x1.png").unlink(), "missing: train/x1.png"),
        (lambda f: (f / "train/new.jpg").write_bytes(b"x"), "extra: train/new.jpg"),
        (
            lambda f: (f / "train/metadata.jsonl").write_text('{"file_name": "../../x.jpg"}\n'),
            "outside its folder",
        ),
        (lambda f: (f / "train/metadata.jsonl").write_text("{"), "is broken"),
        (
            lambda f: (
                (f / "train/x0.jpg").rename(f / "train/x0.gif")
                and (f / "train/metadata.jsonl").write_text('{"file_name": "x0.gif"}\n')
            ),
            "extra|cannot be packed",
        ),
        (
            lambda f: (f / "train/metadata.jsonl").write_text(
                (f / "train/metadata.jsonl").read_text().replace("-aB_0", "y" * 95)
            ),
            "too long",
        ),
    ],
)
def test_rows_and_pictures_that_do_not_belong_together(tmp_path, break_it, words):
    folder = data_folder(tmp_path / "in", 3)
    break_it(folder)
    with pytest.raises(UserError, match=words) as e:
        sh.pack(folder, tmp_path / "out", sh.Shards(), flag=Never())
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_ids_that_tars_would_take_apart_survive():
    for name in ("a.b", "a/b", "a%2Eb", "%", "ü x", "a..b.jpg"):
        assert (
            "." not in sh.key_of(name) and "/" not in sh.key_of(name) and sh.unquote(sh.key_of(name)) == name
        )


# ---- each sample once (D2, B13)
def test_the_engines_plan_sees_every_sample_once_per_epoch_over_ranks_and_workers(packed):
    """Three shuffled epochs of 20 samples in batches of 6 on 2 ranks: batches straddle epochs, nothing is
    padded or dropped, id and pixels belong together.
    """
    from sdcourse.engine.order import Order, Plan, rank_rows

    folder, out = packed
    data = sh.TarSet(out, "train")
    truth = {r["id"]: open_image(folder / "train" / r["file_name"]).tobytes() for r in rows(folder)}
    seen = {}
    for rank in range(2):
        plan = Plan(Order(20, seed=0), 6, (rank_rows(6, rank, 2),), 0, 10)
        loader = torch.utils.data.DataLoader(data, batch_sampler=plan, collate_fn=list, num_workers=2)
        for step, batch in enumerate(loader):
            for row, item in zip(rank_rows(6, rank, 2), batch):
                assert item["image"].tobytes() == truth[item["id"]]
                seen[step * 6 + row] = item["id"]
    order = [seen[p] for p in range(60)]
    assert (
        all(Counter(order[e * 20 : e * 20 + 20]) == Counter(list(truth)) for e in range(3))
        and order[:20] != order[20:40]
    )


def test_a_pickled_set_and_forked_readers_open_their_own_files(packed):
    data = sh.TarSet(packed[1], "train", open_files=2)
    want = [data.read(i) for i in range(20)]
    assert len(data._files) == 2
    twin = pickle.loads(pickle.dumps(data))
    assert [twin.read(i) for i in range(20)] == want
    pid = os.fork()
    if pid == 0:
        os._exit(0 if [data.read(i) for i in range(20)] == want and data._pid == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and data.read(5) == want[5]


# ---- an index that does not fit
@pytest.fixture
def copy(packed, tmp_path):
    import shutil

    shutil.copytree(packed[1], tmp_path / "tars")
    return tmp_path / "tars"


def test_a_tar_that_changed_is_refused(copy):
    tar = copy / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(UserError, match="its index says"):
        sh.TarSet(copy)
    tar.unlink()
    with pytest.raises(UserError, match="No such file"):
        sh.TarSet(copy)
    sh.TarSet(copy, "val")


def test_a_tar_that_is_cut_while_it_is_read(copy):
    data = sh.TarSet(copy, "val")
    for tar in copy.glob("val-*.tar"):
        os.truncate(tar, 1000)
    with pytest.raises(UserError, match="ends inside"):
        data[3]


def test_an_unknown_split_is_refused(packed):
    with pytest.raises(UserError, match="has no split tests; it has train, val"):
        sh.TarSet(packed[1], "tests")
    with pytest.raises(UserError, match="no such file"):
        sh.TarSet(packed[0])


# ---- tars that a JSON file lists
def test_a_json_list_of_tars_is_a_data_set(packed, tmp_path):
    from sdcourse.dataset import DataSet

    shutil.copytree(packed[1], tmp_path / "a/tars")
    tars = sorted(p.name for p in (tmp_path / "a/tars").glob("train-*.tar"))
    listed = tmp_path / "some.json"
    listed.write_text(json.dumps([f"a/tars/{name}" for name in tars[:2]]))
    whole, some = DataSet(tmp_path / "a/tars").pictures("train"), DataSet(listed)
    found = some.pictures("train")
    assert some.splits == ("train",) and 0 < len(found) < len(whole)
    assert list(found.ids) == list(whole.ids)[: len(found)]
    assert found.image(1).tobytes() == whole.image(1).tobytes() and found.row(1) == whole.row(1)
    for text, words in (
        ("{}", "is no list of tars"),
        ("[3]", "is no list of tars"),
        ('["a/tars/no.tar"]', "a/tars/no.tar is in no index.json beside it"),
        ('["b/x.tar"]', "the tars in b/ have no index.json; make it with: sdcourse shards .*b .*b"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=words):
            DataSet(listed)


# ---- tars of strangers
def tar_of(path, *members, end=b"\0" * 1024):
    "A tar from (name, data, fields): written header by header, so that it may lie."
    with open(path, "wb") as f:
        for name, data, fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for k, v in fields.items():
                setattr(info, k, v)
            f.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        f.write(end)
    return path


PIC = picture(16, 16)


def test_foreign_tars_are_indexed(tmp_path):
    tar_of(
        tmp_path / "train-0000.tar",
        ("./", b"", {"type": tarfile.DIRTYPE}),
        ("./a/1.JPG", PIC, {}),
        ("./a/1.txt", "ein Bild\n".encode(), {}),
        ("./a/1.cls", b"7", {}),
        ("2.jpeg", PIC, {}),
        ("2.seg.png", PIC, {}),
        ("3.json", b"{}", {}),
        ("README", b"x", {}),
    )
    tar_of(
        tmp_path / "train-0001.tar",
        ("2.webp", picture(16, 16, format="WEBP"), {}),
        ("2.json", b'{"text": "zwei", "id": "other"}', {}),
    )
    assert sh.index_folder(tmp_path, tmp_path) == 0
    data = sh.TarSet(tmp_path, "train")
    assert data.ids == ["train-0000/a/1", "train-0000/2", "train-0001/2"]
    one, two, three = (data[i] for i in range(3))
    assert (
        (one["text"], one["label"]) == ("ein Bild", 7)
        and "text" not in two
        and (three["text"], three["id"]) == ("zwei", "train-0001/2")
        and three["image"].size == (16, 16)
    )
    assert {
        (w["key"], w["reason"]) for w in json.loads((tmp_path / "index.json").read_text())["left_out"]
    } == {
        ("2.seg.png", "neither picture nor caption"),
        ("README", "neither picture nor caption"),
        ("3", "no picture"),
    }


def test_a_broken_sample_is_named(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        ("ok.jpg", PIC, {}),
        ("cut.jpg", PIC[:-40], {}),
        ("json.jpg", PIC, {}),
        ("json.json", b"{", {}),
        ("cls.jpg", PIC, {}),
        ("cls.cls", b"cat", {}),
        ("txt.jpg", PIC, {}),
        ("txt.txt", b"\xff", {}),
    )
    sh.index_folder(tmp_path, tmp_path)
    data = sh.TarSet(tmp_path)
    assert data[0]["id"] == "a/ok"
    for i, words in (
        (1, "truncated"),
        (2, "caption is broken"),
        (3, "caption is broken"),
        (4, "caption is broken"),
    ):
        with pytest.raises(UserError) as e:
            data[i]
        assert (
            words in str(e.value)
            and data.id(i) in str(e.value)
            and "a.tar" in str(e.value)
            and "\n" not in str(e.value)
        )


def test_our_own_index_is_what_a_stranger_would_find(packed):
    for tar in packed[1].glob("*.tar"):
        assert sh.index_tar(tar) == (
            [json.loads(l) for l in tar.with_suffix(".index.jsonl").read_text().splitlines()],
            [],
        )


def test_pax_and_gnu_long_names(tmp_path):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "x.tar", "w", format=form) as tar:
            info = tarfile.TarInfo("d/" + "k" * 150 + "ü.jpg")
            info.size = len(PIC)
            tar.addfile(info, io.BytesIO(PIC))
        (row,), _ = sh.index_tar(tmp_path / "x.tar")
        offset, size = row["jpg"]
        assert row["key"].endswith("ü") and (tmp_path / "x.tar").read_bytes()[offset : offset + size] == PIC


@pytest.mark.parametrize(
    "member, words",
    [
        (("../../x.jpg", PIC, {}), "leads out"),
        (("/etc/x.jpg", PIC, {}), "leads out"),
        (("a/../../x.jpg", PIC, {}), "leads out"),
        (("a\n.jpg", PIC, {}), "leads out"),
        (("C:/x.jpg", PIC, {}), "leads out"),
        (("x.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}), "a link to /etc/passwd"),
        (("x.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "y"}), "a link to y"),
        (("x.jpg", b"", {"type": tarfile.CHRTYPE}), "no plain file"),
        (("x.jpg", b"", {"type": tarfile.FIFOTYPE}), "no plain file"),
        (("x.jpg", PIC, {"size": 10**9}), "says it has 1,000,000,000"),
        (("x.jpg", PIC, {"size": 2**60}), "says it has"),
        (("x.jpg", PIC, {"size": -512}), ""),
        (("x.jpg", PIC, {"type": tarfile.GNUTYPE_SPARSE}), ""),
        ((f"{'x' * 5000}.jpg", PIC, {}), "more than 1000 characters"),
    ],
)
def test_hostile_members(tmp_path, member, words):
    path = tar_of(tmp_path / "x.tar", ("ok.jpg", PIC, {}), member)
    with pytest.raises(UserError) as e:
        sh.index_tar(path)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_sparse_member_is_refused(tmp_path):
    sparse = Path(tmp_path / "x.jpg")
    with open(sparse, "wb") as f:
        f.truncate(10_000_000)
        f.seek(9_000_000)
        f.write(b"x")
    done = subprocess.run(["tar", "--sparse", "-cf", "x.tar", "x.jpg"], cwd=tmp_path, capture_output=True)
    if done.returncode or (tmp_path / "x.tar").stat().st_size > 1_000_000:
        pytest.skip("this tar writes no sparse members")
    with pytest.raises(UserError, match="no plain file"):
        sh.index_tar(tmp_path / "x.tar")


def test_a_pax_header_that_lies_about_the_size(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={}) as tar:
        info = tarfile.TarInfo("x.jpg")
        info.size = len(PIC)
        info.pax_headers = {"size": str(10**15)}
        tar.addfile(info, io.BytesIO(PIC))
    with pytest.raises(UserError):
        sh.index_tar(tmp_path / "x.tar")


def test_duplicate_members_and_two_pictures(tmp_path):
    with pytest.raises(UserError, match="there twice"):
        sh.index_tar(tar_of(tmp_path / "x.tar", ("a.jpg", PIC, {}), ("a.jpg", PIC, {})))
    with pytest.raises(UserError, match="two pictures"):
        sh.index_tar(tar_of(tmp_path / "x.tar", ("a.jpg", PIC, {}), ("a.png", PIC, {})))
    with pytest.raises(UserError, match="there twice"):
        sh.index_tar(tar_of(tmp_path / "x.tar", ("a.jpg", PIC, {}), ("./a.jpg", PIC, {})))


def test_every_cut_is_noticed(tmp_path):
    "Cut at every block: in a header, in data, between members, in the end."
    whole = tar_of(
        tmp_path / "x.tar", ("a.jpg", PIC, {}), ("a.txt", b"t", {}), ("b.jpg", PIC, {})
    ).read_bytes()
    assert len(sh.index_tar(tmp_path / "x.tar")[0]) == 2
    for cut in {*range(0, len(whole), 512), 100, 700, len(whole) - 1}:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError):
            sh.index_tar(tmp_path / "x.tar")


def test_every_damaged_header_is_noticed(tmp_path):
    path = tar_of(tmp_path / "x.tar", ("a.jpg", PIC, {}), ("b.jpg", PIC, {}))
    whole, second = path.read_bytes(), 512 + -(-len(PIC) // 512) * 512
    for at in (0, second, second + 124, second + 150, second + 156):
        data = bytearray(whole)
        data[at] ^= 0x55
        path.write_bytes(data)
        with pytest.raises(UserError):
            sh.index_tar(path)


def test_what_is_no_tar(tmp_path):
    import gzip

    tar_of(tmp_path / "x.tar", ("a.jpg", PIC, {}))
    for data in (
        b"",
        b"<html>" * 200,
        gzip.compress((tmp_path / "x.tar").read_bytes()),
        (tmp_path / "x.tar").read_bytes() * 2,
        os.urandom(5000),
    ):
        (tmp_path / "y.tar").write_bytes(data)
        with pytest.raises(UserError) as e:
            sh.index_tar(tmp_path / "y.tar")
        assert "y.tar" in str(e.value) and "\n" not in str(e.value)


# ---- the command
def command(*argv, **kwargs):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from sdcourse.cli import main; sys.exit(main())",
            "shards",
            *map(str, argv),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def test_the_command_packs_and_indexes(packed, tmp_path, capsys):
    folder, out = packed
    assert (
        cli.main(["shards", str(folder), str(tmp_path / "out"), "--max-bytes", "20480"]) == 0
        and "27 samples in" in capsys.readouterr().out
    )
    assert tree(tmp_path / "out") == tree(out)
    assert (
        cli.main(["shards", str(folder), str(tmp_path / "out"), "--max-bytes", "20480"]) == 0
        and "there already" in capsys.readouterr().out
    )
    assert cli.main(["shards", str(out), str(tmp_path / "index")]) == 0
    data = sh.TarSet(tmp_path / "index", "train")
    assert len(data) == 20 and data[3]["text"] == "über 3" and data.tars[0].startswith("..")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["nowhere", "out"], "nowhere: no such folder"),
        (["."], "expected IN OUT"),
        ([".", "../out"], "holds no pictures"),
        ([".", "out"], "lies inside ."),
        ([".", "out", "--max-byte", "3"], "did you mean '--max-bytes'"),
    ],
)
def test_a_wrong_command_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["shards", *argv]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ") and err.count("\n") == 1 and words in err and list(tmp_path.iterdir()) == []
    )


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(packed, tmp_path):
    folder, out = packed

    class After(Never):
        reason = "test"
        n = 0

        def raised(self):
            self.n += 1
            return self.n > 3

    for _ in range(2):
        assert sh.pack(folder, tmp_path / "out", sh.Shards(max_bytes=20_480), flag=After()) == 0
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.partial").glob("*.tar"))) == 6
    first = (tmp_path / "out.partial/train-00000.tar").stat().st_ino
    sh.pack(folder, tmp_path / "out", sh.Shards(max_bytes=20_480), flag=Never())
    assert tree(tmp_path / "out") == tree(out) and (tmp_path / "out/train-00000.tar").stat().st_ino == first


@pytest.mark.timeout(120)
def test_signal_and_no_space(packed, tmp_path):
    folder, out = packed
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
    child = command(folder, tmp_path / "out", "--max-bytes", "20480", preexec_fn=limit)
    _, err = child.communicate(timeout=60)
    assert (
        child.returncode == 2
        and err.startswith("error: ")
        and err.count("\n") == 1
        and "limit on file sizes" in err
    )
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").glob("*tmp*"))
    (tmp_path / "out.partial/STOP").touch()
    child = command(folder, tmp_path / "out", "--max-bytes", "20480")
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and "stopped (file STOP)" in said and not (tmp_path / "out").exists()
    assert command(folder, tmp_path / "out", "--max-bytes", "20480").wait() == 0 and tree(
        tmp_path / "out"
    ) == tree(out)


def test_changed_pictures_are_another_set(packed, tmp_path):
    folder = data_folder(tmp_path / "in", 3)
    sh.pack(folder, tmp_path / "out", sh.Shards(), flag=Never())
    (folder / "train/x0.jpg").write_bytes(picture(41, 30))
    with pytest.raises(UserError, match="content"):
        sh.pack(folder, tmp_path / "out", sh.Shards(), flag=Never())


# ---- nothing is lost on the way
def tar_with(path, *names):
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            data = picture(20, 16, seed=i, format="PNG") if name.endswith("png") else b"a cat"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    "names, wanted",
    [
        (("imagenet1k-train-0000", "imagenet1k-validation-00"), {"train", "val"}),
        (("cc3m-train-0000", "cc3m-train-0001"), {"train"}),
        (("laion2B-en-00001",), {"train"}),
        (("00000", "00001"), {"train"}),
        (("Test_0", "VALID_0", "cats-0"), {"test", "val", "cats"}),
    ],
)
def test_tars_of_the_hub_have_the_usual_splits(tmp_path, names, wanted):
    for name in names:
        tar_with(tmp_path / f"{name}.tar", "a.png", "a.txt")
    assert sh.index_folder(tmp_path, tmp_path) == 0
    assert {t["split"] for t in json.loads((tmp_path / "index.json").read_text())["tars"]} == wanted


def test_dots_in_names_are_counted_and_many_refused(tmp_path, caplog):
    tar_with(tmp_path / "a-0.tar", *(f"{i}.png" for i in range(18)), "0.seg.png", "22.01.png", "22.01.txt")
    assert sh.index_folder(tmp_path, tmp_path) == 0 and len(sh.TarSet(tmp_path)) == 18
    assert "1 of 19 samples cannot be read" in caplog.text and "a-0.tar: 22.01.png" in caplog.text
    tar_with(tmp_path / "a-0.tar", "22.01.png", "22.01.txt", "3.png")
    with pytest.raises(UserError, match="1 of 2 samples .* a-0.tar: 22.01.png"):
        sh.index_folder(tmp_path, tmp_path)


def plain(home, *names):
    "Pictures of these names, all different."
    for i, name in enumerate(names):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(picture(20, 16, seed=i, format="PNG"))
    return home


def packed_rows(folder, out):
    "{split: rows} of the tars of a folder, without what tars add, and its classes."
    assert sh.pack(folder, out, sh.Shards(), flag=Never()) == 0
    classes = pictures(out, splits(out)[0]).classes
    return {s: [pictures(out, s).row(i) for i in range(len(pictures(out, s)))] for s in splits(out)}, classes


@pytest.mark.parametrize("layout", ["root", "csv", "classes", "kohya", "nested", "val"])
def test_tars_hold_what_a_training_on_the_folder_would_see(tmp_path, layout):
    "Case 38: every layout that is read is packed, and no split is left behind."
    home = plain(tmp_path / "in", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    if layout == "root":
        rows = [{"file_name": f"{n}.png", "text": n} for n in ("train/cat/1", "train/dog/2", "val/cat/3")]
        (home / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif layout == "csv":
        (home / "train/metadata.csv").write_text("file_name,text,label\ncat/1.png,one,0\ndog/2.png,two,1\n")
        (home / "val/metadata.csv").write_text("file_name,text,label\ncat/3.png,three,0\n")
    elif layout == "kohya":
        for p in home.rglob("*.png"):
            p.with_suffix(".txt").write_text(f"a {p.stem}")
    elif layout == "nested":
        for p in home.rglob("*.png"):
            (p.parent / "metadata.jsonl").write_text(json.dumps({"file_name": p.name, "text": p.stem}) + "\n")
    elif layout == "val":
        rows = [{"file_name": n, "text": n} for n in ("cat/1.png", "dog/2.png")]
        (home / "train/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows, classes = packed_rows(home, tmp_path / "out")
    for split in splits(home):
        data = pictures(home, split)
        assert rows[split] == [data.row(i) for i in range(len(data))] and classes == pictures(home).classes
    assert {s: len(r) for s, r in rows.items()} == {"train": 2, "val": 1}


def test_two_pictures_with_one_id_are_not_packed(tmp_path):
    home = plain(tmp_path / "in", "a.png")
    (home / "a.jpg").write_bytes(picture(20, 16))
    with pytest.raises(UserError, match="another picture has its id"):
        sh.pack(home, tmp_path / "out", sh.Shards(), flag=Never())
    assert not list(tmp_path.glob("out*"))


def test_what_is_packed_already_is_not_packed_again(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").write_bytes(b"PAR1")
    assert cli.main(["shards", str(tmp_path), str(tmp_path / "out")]) == 2


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d, p: p.write_bytes(d[: len(d) // 2]), "the tar ends before that; it is cut off|is cut off"),
        (lambda d, p: p.write_bytes(d[:3000]), "is cut off"),
        (lambda d, p: p.write_bytes(d[:200]), "is cut off or damaged"),
        (lambda d, p: p.write_bytes(d.rstrip(b"\0")), "is cut off"),
        (lambda d, p: p.write_bytes(b""), "is cut off or damaged"),
        (lambda d, p: p.write_bytes(bytes(600)), "is cut off"),
        (lambda d, p: p.write_bytes(gzip.compress(d)), "is compressed; unpack it first"),
        (lambda d, p: p.write_bytes(b"<html>" * 300), "is no tar .*; remove or rename it"),
        (lambda d, p: (p.unlink(), os.mkfifo(p)), "is no plain file"),
    ],
)
def test_what_is_wrong_with_a_tar_is_said_as_it_is(tmp_path, change, words):
    "Case 21: a remedy for the fault that it has; and a pipe does not hang."
    tar_with(tmp_path / "a.tar", "1.png", "2.png", "3.png")
    change((tmp_path / "a.tar").read_bytes(), tmp_path / "a.tar")
    with pytest.raises(UserError) as e:
        sh.index_folder(tmp_path, tmp_path)
    assert re.search(words, str(e.value)) and "\n" not in str(e.value), str(e.value)
    assert ("unpack" in str(e.value)) == ("compressed" in words)


HOSTILE_INDEX = [
    "[]",
    "{}",
    '{"quoted": true, "tars": {}}',
    '{"quoted": true, "tars": [7]}',
    '{"quoted": 1, "tars": []}',
    '{"quoted": true, "tars": [{"tar": "a.tar"}]}',
    '{"format": 1, "kind": "latents", "shards": []}',
]


@pytest.mark.parametrize("text", HOSTILE_INDEX)
def test_an_index_of_something_else_is_one_line(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    for read in (sh.TarSet, pictures, splits):
        with pytest.raises(UserError, match="index") as e:
            read(tmp_path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "7",
        "{",
        '{"key": "a"',
        '{"jpg": [0, 1]}',
        '{"key": "a", "exe": [0, 1]}',
        '{"key": "a", "png": 3}',
    ]
    + [
        f'{{"key": "a", "png": [{a}, {b}]}}'
        for a, b in ((0, 10**9), (-5, 3), (10**30, 1), ('"x"', 1), (0, -9))
    ],
)
def test_rows_of_a_hostile_index_are_one_line(tmp_path, line):
    tar_with(tmp_path / "a.tar", "1.png")
    sh.index_folder(tmp_path, tmp_path)
    (tmp_path / "a.index.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="a.index.jsonl: is damaged .*make the index again"):
        pictures(tmp_path)


def test_a_column_that_the_first_sample_lacks_is_known(tmp_path):
    tar_of(
        tmp_path / "a.tar",
        ("1.png", PIC, {}),
        ("2.png", PIC, {}),
        ("2.json", b'{"words": "two"}', {}),
    )
    sh.index_folder(tmp_path, tmp_path)
    assert pictures(tmp_path, caption_column="words").row(1)["texts"] == ["two"]
