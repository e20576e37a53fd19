"""A data folder is absent or whole, whatever interrupts its making; jobs run in parallel until a stop."""

import contextlib, io, os, shutil, subprocess, sys, threading

import pytest
import torch

from nobody import OpenFolder, as_nobody
from sdcourse import cli
from sdcourse.core import UserError, differences
from sdcourse.data.manifests import described, load_manifest, manifest_folder, origin, verify
from sdcourse.engine.work import OWNER
from sdcourse.data.prepare import Failed, Prepare, Stopped, Work, command, save_bytes

ORIGIN = load_manifest("digits")


def make(out, names="abc", facts=None, published=True):
    with Work(out, {"size": 1} if facts is None else facts) as work:
        if work.whole:
            return "whole"
        done = sorted(work.done)
        for n in names:
            if n not in work.done:
                (work.folder / n).parent.mkdir(exist_ok=True)
                work.record({"id": n, **save_bytes(n.encode(), work.folder / n)})
        if published:
            work.publish(ORIGIN)
        return done


# ---- absent or whole
def test_nothing_looks_whole_before_it_is(tmp_path):
    make(tmp_path / "set", published=False)
    assert not (tmp_path / "set").exists() and (tmp_path / "set.partial").is_dir()
    assert make(tmp_path / "set") == ["a", "b", "c"]
    assert (
        sorted(p.name for p in (tmp_path / "set").iterdir()) == ["a", "b", "c", "manifest.json"]
        and not (tmp_path / "set.partial").exists()
    )
    assert (
        verify(load_manifest(tmp_path / "set/manifest.json"), tmp_path / "set") == []
        and make(tmp_path / "set") == "whole"
    )


def test_a_death_at_any_moment_leaves_nothing_half(tmp_path):
    """The process is killed before its k-th file operation, for every k; the next start ends with the same
    folder.
    """
    want, k = None, 0
    while True:
        out, count = tmp_path / f"{k}/set", [0]
        out.parent.mkdir()
        pid = os.fork()
        if pid == 0:

            def die_at_k(event, args):
                if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out.parent) in str(
                    args[0]
                ):
                    if count[0] == k:
                        os._exit(9)
                    count[0] += 1

            sys.addaudithook(die_at_k)
            try:
                make(out)
                os._exit(0)
            except BaseException:
                os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        if out.exists():
            assert verify(load_manifest(out / "manifest.json"), out) == []
        make(out)
        found = {f.name: f.read_bytes() for f in out.iterdir()}
        want = want or found
        assert found == want and [f.name for f in out.parent.iterdir()] == ["set"]
        if code == 0:
            break
        k += 1
    assert k > 12


def test_a_torn_line_of_the_journal_is_done_again(tmp_path):
    make(tmp_path / "set", published=False)
    journal = tmp_path / "set.partial/done.jsonl"
    journal.write_text(journal.read_text()[:-4])
    assert make(tmp_path / "set", published=False) == ["a", "b"] and make(tmp_path / "set") == ["a", "b", "c"]


def test_other_facts_are_refused_with_the_difference(tmp_path):
    make(tmp_path / "set", facts={"size": 1, "seed": 0}, published=False)
    with pytest.raises(UserError, match="size: 1 -> 2, more: None -> 3"):
        make(tmp_path / "set", facts={"size": 2, "seed": 0, "more": 3})
    make(tmp_path / "set", facts={"size": 1, "seed": 0})
    with pytest.raises(UserError, match="seed: 0 -> 1.*choose another OUT"):
        make(tmp_path / "set", facts={"size": 1, "seed": 1})
    assert differences({"a": (1, 2)}, {"a": (1, 2)}) == ""


def test_what_is_not_ours_is_never_touched(tmp_path):
    for name in ("set", "other.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years")
        with pytest.raises(UserError, match="was not made by this command"):
            make(tmp_path / name.removesuffix(".partial"))
        assert [p.name for p in (tmp_path / name).iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError):
        make(tmp_path / "file")


def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "set").mkdir()
    make(f"{tmp_path}/set/")
    assert (tmp_path / "set/manifest.json").is_file()


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with Work(tmp_path / "set", {"size": 1}):
        for _ in range(2):
            with pytest.raises(UserError, match="another process"):
                make(tmp_path / "set")
    make(tmp_path / "set")


def test_nothing_is_swept_where_locks_are_unknown(tmp_path, monkeypatch):
    "Case 49: the owner is a file, so that it holds without `flock`, and what it writes now is not swept."
    import errno, fcntl

    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with Work(tmp_path / "set", {"size": 1}) as work:
        (work.folder / ".half.png.7.tmp").touch()
        with pytest.raises(UserError, match="another process"):
            make(tmp_path / "set")
        assert (work.folder / ".half.png.7.tmp").exists()


def test_an_owner_leaves_no_trace_in_what_is_published(tmp_path):
    make(tmp_path / "set")
    names = sorted(p.name for p in (tmp_path / "set").iterdir())
    assert OWNER not in names and OWNER not in (tmp_path / "set/manifest.json").read_text()
    (tmp_path / "set" / OWNER).touch()  # killed between the rename and the end
    make(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == names


def test_a_folder_that_another_has_taken_is_written_no_more(tmp_path):
    "As after a silence of minutes."
    with pytest.raises(UserError, match="another process has taken this folder"):
        with Work(tmp_path / "set", {"size": 1}) as work:
            (work.folder / OWNER).write_text("{}")
            work._lose()
            work.record({"id": "a"})
    assert "a" not in (tmp_path / "set.partial/done.jsonl").read_text()
    with pytest.raises(UserError, match="another process has taken this folder"):
        with Work(tmp_path / "other", {"size": 1}) as work:
            (work.folder / OWNER).write_text("{}")
            work.publish({})
    assert not (tmp_path / "other").exists()


def test_a_place_that_may_not_be_written(monkeypatch):
    "Seen before it begins; and in one line, too, where the system says that it may be."
    with OpenFolder() as folder:
        folder.chmod(0o755)

        def ask():
            try:
                make(folder / "set")
            except UserError as e:
                return str(e)

        assert as_nobody(ask) == f"OUT {folder}: {folder} cannot be written to; choose another folder"
        monkeypatch.setattr(os, "access", lambda *_, **__: True)
        said = as_nobody(ask)
        assert said.startswith(f"{folder}/set.partial: Permission denied; ") and "\n" not in said
        assert not list(folder.iterdir())


def test_leftovers_of_a_kill_are_swept_up(tmp_path):
    make(tmp_path / "set", published=False)
    (tmp_path / "set.partial/.x.jpg.123.tmp").write_text("half")
    (tmp_path / "set.partial/STOP").touch()
    make(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["a", "b", "c", "manifest.json"]


# ---- many files
def half(n):
    "A toy for workers; 3 cannot be had, 5 is a bug, and 7 finds the disk full."
    if n == 3:
        raise Failed("three")
    if n == 4:
        raise Stopped("stopped")
    if n == 5:
        raise ValueError("a bug")
    if n == 7:
        raise OSError(28, "No space left on device", "somewhere")
    return {"file": str(n), **save_bytes(b"x" * n, half.folder / str(n))}


@pytest.mark.parametrize(
    "how", [dict(workers=1), dict(workers=2), dict(workers=2, stop=threading.Event())], ids=str
)
def test_run_reports_what_failed_and_keeps_the_journal(tmp_path, how):
    for jobs in ([0, 1, 2, 3], [1, 2, 3, 4, 5, 6]):
        with Work(tmp_path / "set", {}) as work:
            half.folder = work.folder
            failed = list(work.run(jobs, half, str, **how))
            done = {n for n in range(8) if work.has(str(n))}
    assert sorted(failed) == [(3, "three"), (5, "unexpected ValueError: a bug")] and done == {0, 1, 2, 6}
    with (
        Work(tmp_path / "set", {}) as work,
        pytest.raises(UserError, match="somewhere: No space left.*free some space"),
    ):
        list(work.run([6, 7], half, str, **how))


def test_a_file_that_became_shorter_is_made_again(tmp_path):
    with Work(tmp_path / "set", {}) as work:
        half.folder = work.folder
        list(work.run([1, 2, 6], half, str, workers=1))
    (work.folder / "6").write_bytes(b"x")
    before = (work.folder / "2").stat().st_ino
    with Work(tmp_path / "set", {}) as work:
        assert [n for n in (1, 2, 6) if work.has(str(n))] == [1, 2]
        list(work.run([1, 2, 6], half, str, workers=1))
    assert (work.folder / "6").read_bytes() == b"x" * 6 and (work.folder / "2").stat().st_ino == before


def test_what_the_journal_does_not_know_is_swept_up(tmp_path):
    with Work(tmp_path / "set", {}) as work:
        half.folder = work.folder
        list(work.run([1, 2], half, str, workers=1))
    (work.folder / "train").mkdir()
    for name in ("9", "train/metadata.jsonl", "train/.x.jpg.12.tmp"):
        (work.folder / name).write_text("of a start that was killed")
    with Work(tmp_path / "set", {}) as work:
        work.publish(ORIGIN)
    assert sorted(p.name for p in (tmp_path / "set").rglob("*") if p.is_file()) == ["1", "2", "manifest.json"]


def test_the_manifest_is_not_hashed_twice(tmp_path, monkeypatch):
    "Checksums of the journal are used: a picture is not read again to be published."
    from sdcourse.data import manifests

    hashed = []
    digest = manifests.digest
    monkeypatch.setattr(manifests, "digest", lambda path, **k: hashed.append(path.name) or digest(path, **k))
    make(tmp_path / "set")
    assert hashed == []


# ---- one form for all
def test_a_source_that_describes_itself_is_the_origin(tmp_path):
    make(tmp_path / "set", names=["in/a"])
    for folder in (tmp_path / "set", tmp_path / "set/in"):
        assert origin("celeba-hq", folder)["name"] == "digits"
    (tmp_path / "set/other").mkdir()
    assert (
        origin("celeba-hq", tmp_path / "set/other")["name"]
        == "celeba-hq"
        == origin("celeba-hq", tmp_path)["name"]
        == origin("celeba-hq")["name"]
    )
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    assert described(tmp_path) is None


TINY = {  # set: (arguments, what comes before it); small worlds for every command
    "faces": "faces OUT --celeba 60 --hq 40 --hq-size 32 --identities 40",
    "celeba-hq": "celeba-hq faces/CelebAMask-HQ OUT",
    "celeba": "celeba faces/CelebA faces/CelebAMask-HQ OUT --min-side 80 --size 32",
    "digits": "digits OUT",
    "imagenet": "imagenet digits OUT --size 8 --per-class 2",
    "photos": "photos OUT --crops 1",
    "unsplash": "unsplash photos OUT --size 32",
    "scenes": "scenes OUT --train 30 --val 4 --test 4 --size 32",
    "emoji": "emoji OUT --train 20",
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    home = tmp_path_factory.mktemp("worlds")
    here = os.getcwd()
    os.chdir(home)
    try:
        for name, words in TINY.items():
            assert cli.main(["prepare", *words.replace("OUT", name).split(), "--workers", "2"]) == 0
    finally:
        os.chdir(here)
    return home


def test_every_set_of_the_table_is_tried():
    assert set(TINY) | {"folder"} == set(
        cli.choices("prepare")
    )  # somebody's own pictures: tests/test_folder.py


@pytest.mark.parametrize("name", TINY)
def test_every_set_carries_a_manifest_and_every_change_is_found(worlds, tmp_path, name):
    out = shutil.copytree(worlds / name, tmp_path / name)
    mine = load_manifest(out / "manifest.json")
    assert (
        mine["name"]
        == {"celeba-hq": "faces", "celeba": "faces", "imagenet": "digits", "unsplash": "photos"}.get(
            name, name
        )
        and mine["prepared"]["set"] == name
    )
    assert verify(mine, out) == [] and str(worlds) not in (out / "manifest.json").read_text()
    files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "manifest.json")
    (out / "new.png").touch()
    assert verify(mine, out) == ["extra: new.png"]
    (out / "new.png").unlink()
    picture = next(p for p in files if p.suffix in (".png", ".jpg"))
    data = bytearray(picture.read_bytes())
    data[-20] ^= 1
    picture.write_bytes(data)
    assert [v.split(" (")[0] for v in verify(mine, out)] == [
        f"altered: {picture.relative_to(out).as_posix()}"
    ]
    files[-1].unlink()
    assert f"missing: {files[-1].relative_to(out).as_posix()}" in verify(mine, out)


@pytest.mark.parametrize("name", TINY)
def test_every_set_stops_goes_on_and_refuses_other_options(worlds, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(worlds)
    argv = ["prepare", *TINY[name].replace("OUT", str(tmp_path / "o")).split(), "--workers", "1"]
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial/STOP").touch()
    with pytest.raises(UserError, match="was not made by this command"):
        raise_from(argv, capsys)
    (tmp_path / "o.partial/STOP").unlink()
    assert cli.main([*argv, "--max-seconds", "1e-9"]) == 0 and not (tmp_path / "o").exists()
    assert "stopped (deadline), 0 of " in capsys.readouterr().out
    assert cli.main(argv) == 0
    drop = lambda d: {p.relative_to(d).as_posix(): p.read_bytes() for p in d.rglob("*") if p.is_file()}
    assert drop(tmp_path / "o") == drop(worlds / name)
    capsys.readouterr()
    assert cli.main(argv) == 0 and "there already" in capsys.readouterr().out
    other = {
        "digits": ["--scale", "2"],
        "unsplash": ["--size", "33"],
        "imagenet": ["--size", "9"],
        "emoji": ["--train", "21"],
    }.get(name, ["--seed", "1"])
    with pytest.raises(UserError, match=f"{other[0][2:]}: .* -> {other[1]}"):
        raise_from([*argv, *other], capsys)
    with pytest.raises(UserError, match="did you mean"):
        raise_from([*argv, "--max-second", "3"], capsys)


def raise_from(argv, capsys):
    "The command as a user sees it: one line and exit code 2."
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    raise UserError(err)


def test_a_hand_full_of_ways_to_say_it_wrong(capsys):
    for name in TINY:
        with pytest.raises(UserError, match="expected "):
            raise_from(["prepare", name], capsys)
        with pytest.raises(UserError, match="workers.*-2"):
            raise_from(["prepare", *TINY[name].split(), "--workers", "-2"], capsys)
        assert cli.main(["prepare", name, "--help"]) == 0
        assert "--max-seconds" in (page := capsys.readouterr().out) and "OUT" in page


def test_sources_and_places_that_may_not_be_used(worlds):
    """Every set, as a user who may not read the source, nor write beside OUT: one line, and nothing that
    looks whole.
    """
    if not as_nobody(lambda: os.access(manifest_folder() / "schema.json", os.R_OK)):
        pytest.skip("nobody may read this checkout, so nobody can run a command of it")
    with OpenFolder() as folder:
        for name in ("faces", "digits", "photos"):
            shutil.copytree(worlds / name, folder / name)
        (folder / "closed").mkdir(mode=0o555)
        for p in [
            p for name in ("faces", "digits", "photos") for p in (folder / name).iterdir() if p.is_dir()
        ]:
            p.chmod(0)
        (folder / "photos/photos.tsv000").chmod(0)
        os.chmod(folder, 0o755)

        def ask(words):
            torch.set_num_threads(1)  # a forked process hangs where its parent has used several
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                code = cli.main(["prepare", *words.split(), "--workers", "1"])
            return [code, said.getvalue()]

        for name, words in TINY.items():
            words = words.replace("OUT", str(folder / "closed/out"))
            if name in ("celeba-hq", "celeba", "imagenet", "unsplash"):
                words = (
                    words.replace(" faces/", f" {folder}/faces/")
                    .replace(" digits ", f" {folder}/digits ")
                    .replace(" photos ", f" {folder}/photos ")
                )
            code, said = as_nobody(lambda: ask(words))
            assert (
                code == 2 and said.startswith("error: ") and said.count("\n") == 1 and str(folder) in said
            ), (name, said)
        assert not list((folder / "closed").iterdir())


def test_what_the_system_refuses_is_one_line(tmp_path):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", "source/x.jpg")

    with pytest.raises(
        UserError, match="^source/x.jpg: Permission denied; see to it and run the command again"
    ):
        command(closed, tmp_path / "o", Prepare())


# ---- the command
def test_sets_exist_and_help_is_quick(capsys):
    assert cli.main(["prepare"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in TINY)
    code = """
import sys
from sdcourse.cli import main
main(['prepare', '--help'])
assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_an_unknown_set_is_one_line(capsys):
    assert cli.main(["prepare", "unsplsh"]) == 2
    assert capsys.readouterr().err == "error: unknown set 'unsplsh': did you mean 'unsplash'?\n"
