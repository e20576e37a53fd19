"""A data folder is absent or whole, whatever interrupts its making; jobs run in parallel until told to stop."""
import os, subprocess, sys, threading, time

import pytest

from nobody import OpenFolder, as_nobody
from sdcourse import cli
from sdcourse.core import UserError, write_text
from sdcourse.data.manifests import load_manifest, verify
from sdcourse.data.prepare import SETS, Work, differences, in_parallel

ORIGIN = load_manifest("digits")

class Never:
    reason = ""
    def raised(self): return False

def make(out, names="abc", facts=None, published=True):
    with Work(out, {"size": 1} if facts is None else facts) as work:
        if work.whole: return "whole"
        done = sorted(work.done)
        for n in names:
            if n not in work.done:
                write_text(work.folder / n, n)
                work.record({"id": n})
        if published: work.publish(ORIGIN)
        return done

# ---- absent or whole
def test_nothing_looks_whole_before_it_is(tmp_path):
    make(tmp_path / "set", published=False)
    assert not (tmp_path / "set").exists() and (tmp_path / "set.partial").is_dir()
    assert make(tmp_path / "set") == ["a", "b", "c"]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["a", "b", "c", "manifest.json"] and not (tmp_path / "set.partial").exists()
    assert verify(load_manifest(tmp_path / "set/manifest.json"), tmp_path / "set") == [] and make(tmp_path / "set") == "whole"

def test_a_death_at_any_moment_leaves_nothing_half(tmp_path):
    "The process is killed before its k-th file operation, for every k; the next start ends with the same folder."
    want, k = None, 0
    while True:
        out, count = tmp_path / f"{k}/set", [0]
        out.parent.mkdir()
        pid = os.fork()
        if pid == 0:
            def die_at_k(event, args):
                if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(out.parent) in str(args[0]):
                    if count[0] == k: os._exit(9)
                    count[0] += 1
            sys.addaudithook(die_at_k)
            try: make(out); os._exit(0)
            except BaseException: os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9)
        if out.exists(): assert verify(load_manifest(out / "manifest.json"), out) == []
        make(out)
        found = {f.name: f.read_bytes() for f in out.iterdir()}
        want = want or found
        assert found == want and [f.name for f in out.parent.iterdir()] == ["set"]
        if code == 0: break
        k += 1
    assert k > 12

def test_a_torn_line_of_the_journal_is_done_again(tmp_path):
    make(tmp_path / "set", published=False)
    journal = tmp_path / "set.partial/done.jsonl"
    journal.write_text(journal.read_text()[:-4])
    assert make(tmp_path / "set", published=False) == ["a", "b"] and make(tmp_path / "set") == ["a", "b", "c"]

def test_other_facts_are_refused_with_the_difference(tmp_path):
    make(tmp_path / "set", facts={"size": 1, "seed": 0}, published=False)
    with pytest.raises(UserError, match="size: 1 -> 2, more: None -> 3"): make(tmp_path / "set", facts={"size": 2, "seed": 0, "more": 3})
    make(tmp_path / "set", facts={"size": 1, "seed": 0})
    with pytest.raises(UserError, match="seed: 0 -> 1.*choose another OUT"): make(tmp_path / "set", facts={"size": 1, "seed": 1})
    assert differences({"a": (1, 2)}, {"a": (1, 2)}) == ""

def test_what_is_not_ours_is_never_touched(tmp_path):
    for name in ("set", "other.partial"):
        (tmp_path / name).mkdir(); (tmp_path / name / "thesis.tex").write_text("years")
        with pytest.raises(UserError, match="was not made by this command"): make(tmp_path / name.removesuffix(".partial"))
        assert [p.name for p in (tmp_path / name).iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError): make(tmp_path / "file")

def test_an_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "set").mkdir()
    make(f"{tmp_path}/set/")
    assert (tmp_path / "set/manifest.json").is_file()

def test_two_processes_do_not_work_in_one_folder(tmp_path):
    with Work(tmp_path / "set", {"size": 1}):
        for _ in range(2):
            with pytest.raises(UserError, match="another process"): make(tmp_path / "set")
    make(tmp_path / "set")

def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    import errno, fcntl
    def refuse(code):
        def flock(*_): raise OSError(code, os.strerror(code))
        monkeypatch.setattr(fcntl, "flock", flock)
    refuse(errno.EBADF)
    make(tmp_path / "set")
    assert "start only one process" in caplog.text
    refuse(errno.EIO)
    with pytest.raises(UserError, match="Input/output error"): make(tmp_path / "other")

def test_a_place_that_may_not_be_written():
    with OpenFolder() as folder:
        folder.chmod(0o755)
        def ask():
            try: make(folder / "set")
            except UserError as e: return str(e)
        said = as_nobody(ask)
        assert said.startswith(f"{folder}/set.partial: Permission denied; ") and "\n" not in said and not list(folder.iterdir())

def test_leftovers_of_a_kill_are_swept_up(tmp_path):
    make(tmp_path / "set", published=False)
    (tmp_path / "set.partial/.x.jpg.123.tmp").write_text("half"); (tmp_path / "set.partial/STOP").touch()
    make(tmp_path / "set")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["a", "b", "c", "manifest.json"]

# ---- in parallel
def test_all_jobs_once_and_errors_are_results():
    def fn(job, stop):
        if job == 3: raise ValueError("three")
        return job * 10
    got = dict(in_parallel(fn, range(50), 4, Never()))
    assert set(got) == set(range(50)) and isinstance(got.pop(3), ValueError) and all(v == k * 10 for k, v in got.items())
    assert list(in_parallel(fn, [], 4, Never())) == []

def test_jobs_run_at_the_same_time():
    together = threading.Barrier(3, timeout=10)
    assert [r for _, r in in_parallel(lambda job, stop: together.wait() >= 0, range(3), 3, Never())] == [True] * 3

def test_a_stop_begins_no_new_job_and_does_not_wait_for_a_deaf_one():
    begun, release = [], threading.Event()
    class Soon:
        def raised(self): return len(begun) >= 2
    def deaf(job, stop):
        begun.append(job)
        release.wait(60)
    start = time.monotonic()
    assert list(in_parallel(deaf, range(10), 2, Soon())) == [] and len(begun) == 2
    assert time.monotonic() - start < 20
    release.set(); time.sleep(0.2)
    assert len(begun) == 2

def test_what_is_ready_when_the_stop_comes_is_not_lost():
    class Soon:
        def __init__(self): self.at = time.monotonic() + 0.5
        def raised(self): return time.monotonic() > self.at
    got = list(in_parallel(lambda job, stop: stop.wait(60) and job, range(10), 2, Soon()))
    assert len(got) == 2

# ---- the command
def test_sets_exist_and_help_is_quick(capsys):
    assert cli.main(["prepare"]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in SETS)
    import importlib
    for target, text in SETS.values():
        module, name = target.split(":")
        assert text and callable(getattr(importlib.import_module(module), name))
    code = "import sys; from sdcourse.cli import main; main(['prepare', '--help']); assert not {'torch', 'PIL', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

def test_an_unknown_set_is_one_line(capsys):
    assert cli.main(["prepare", "unsplsh"]) == 2
    assert capsys.readouterr().err == "error: unsplsh: cannot be prepared; did you mean 'unsplash'?\n"
