"""A sweep trains each combination in a folder of its own and makes one table, also when two end at once or
one is missing.
"""

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from sdcourse.cli import main
from sdcourse.commands.sweep import combinations, plan_sweep, rows, run_name, sweep, write_table
from sdcourse.core import UserError
from sdcourse.engine.work import Owner

WORDS = (
    "flow_dit --preset tiny --max-steps 3 --warmup-steps 1 --num-samples 0 --size tiny/8 --device cpu".split()
)


def test_every_combination_once():
    found = combinations(["density-mean=-1,0,1", "lr=1e-4,3e-4", "guidance_interval=0,1;0.1,0.9"])
    assert len(found) == 12 == len({run_name(c) for c in found}) and found[1] == dict(
        density_mean="-1", lr="1e-4", guidance_interval="0.1,0.9"
    )


@pytest.mark.parametrize(
    "words, text",
    [
        (["--vary", "densty_mean=1,2"], "did you mean '--density-mean'?"),
        (["--vary", "lr=1e-4,fast"], "--lr: expected a number"),
        (["--vary", "lr=0"], "--lr 0.0: must be greater than 0"),
        (["--vary", "lr"], "--vary lr"),
        (["--vary", "lr=1,1"], "twice"),
        (["--vary", "lr=1", "--vary", "lr=2"], "lr is there twice"),
        ([], "nothing varies"),
        (["--vary", "out=a,b"], "--vary out: each run has a folder of its own"),
        (["--vary", "lr=1,2", "--index", "2"], "0 to 1; submit with --array=0-1"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_trains(tmp_path, capsys, words, text):
    assert main(["sweep", *WORDS, *words, "--out", str(tmp_path / "s")]) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "s").exists()


@pytest.mark.parametrize("out", ["file", "file/s"])
def test_a_file_in_the_way_of_a_sweep_is_said_before_it_begins(tmp_path, capsys, out):
    (tmp_path / "file").touch()
    assert main(["sweep", *WORDS, "--vary", "lr=1", "--out", str(tmp_path / out), "--run"]) == 2
    err = capsys.readouterr().err
    assert "file is a file; choose another folder" in err and err.count("\n") == 1


def test_a_sweep_on_a_laptop(tmp_path, capsys):
    words = [*WORDS, "--vary", "density_mean=-0.5,0.5", "--out", str(tmp_path / "s")]
    assert sweep(words) == 0 and "--array=0-1" in capsys.readouterr().out and not (tmp_path / "s").exists()
    assert sweep([*words, "--index", "1"]) == 0 and capsys.readouterr().out.splitlines() == [
        *WORDS,
        "--density-mean=0.5",
        f"--out={tmp_path}/s/density_mean=0.5",
    ]
    assert sweep([*words, "--run"]) == 0
    found = json.loads((tmp_path / "s/table.json").read_text())
    assert [(r["density_mean"], r["state"]) for r in found] == [
        ("-0.5", "finished"),
        ("0.5", "finished"),
    ] and found[0]["val_loss"] != found[1]["val_loss"]
    assert (
        "| density_mean | state |" in (tmp_path / "s/table.md").read_text()
        and "--vary" in (tmp_path / "s/table.md").read_text()
    )
    stamp = (tmp_path / "s/density_mean=0.5/export").stat().st_mtime_ns
    assert (
        sweep([*words, "--run"]) == 0 and (tmp_path / "s/density_mean=0.5/export").stat().st_mtime_ns == stamp
    )  # finished ones take no time


def test_a_run_that_is_missing_has_a_row_that_says_so(tmp_path):
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "lr=1/metrics.jsonl").write_text('{"step": 7, "loss": 0.5, "seconds": 1.0}\n')
    assert rows(combinations(["lr=1,2"]), tmp_path) == [
        dict(lr="1", state="at step 7", loss=0.5),
        dict(lr="2", state="not started"),
    ]


def test_runs_that_end_together_leave_one_whole_table(tmp_path):
    found = combinations(["lr=1,2,3,4,5,6,7,8"])

    def end(c):
        folder = tmp_path / run_name(c)
        (folder / "export").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        write_table(found, tmp_path, "…")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(end, found))
    assert [r["state"] for r in json.loads((tmp_path / "table.json").read_text())] == ["finished"] * 8


def test_a_table_waits_for_its_turn_and_not_for_ever(tmp_path, monkeypatch):
    "Case 49: the turn is a file in the folder, which also holds without `flock`."
    import sdcourse.commands.sweep as module

    found = combinations(["lr=1,2"])
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    with Owner(tmp_path):
        with pytest.raises(UserError, match="another process"):
            write_table(found, tmp_path, "…")
    assert not (tmp_path / "table.md").exists()
    write_table(found, tmp_path, "…")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["table.json", "table.md"]


def test_the_plan_names_a_folder_for_each(tmp_path):
    with pytest.raises(UserError, match="unknown task"):
        plan_sweep(["flow_ditt", "--vary", "lr=1"])
    _, _, words = plan_sweep([*WORDS, "--vary", "size=tiny/4,tiny/8"])
    assert [w[-1] for w in words] == [
        "--out=runs/sweep-flow_dit/size=tiny-4",
        "--out=runs/sweep-flow_dit/size=tiny-8",
    ]


def sweeping(tmp_path, monkeypatch, values, step_of):
    "The command with --run; `step_of(run, step)` is what a step does."
    import sdcourse.engine.loop as loop

    step = loop.step
    monkeypatch.setattr(loop, "step", lambda r: step_of(r, step))
    words = [w if w != "3" else "12" for w in WORDS]
    code = main(["sweep", *words, "--log-every", "4", "--checkpoint-every", "4", "--max-bad-steps", "3",
                 "--vary", f"lr={values}", "--out", str(tmp_path / "s"), "--run"])  # fmt: skip
    return code, [r["state"] for r in json.loads((tmp_path / "s/table.json").read_text())]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_one_signal_ends_a_sweep(tmp_path, monkeypatch, name):
    "faults.md E: sent in the first of three runs; the same command goes on."

    def one(r, step):
        step(r)
        if r.step == 5 and r.cfg.lr == 1e-3:
            os.kill(os.getpid(), getattr(signal, name))

    found = sweeping(tmp_path, monkeypatch, "1e-3,1e-4,1e-5", one)
    assert found == (75, ["at step 4", "not started", "not started"])
    monkeypatch.undo()
    assert sweeping(tmp_path, monkeypatch, "1e-3,1e-4,1e-5", lambda r, step: step(r)) == (0, ["finished"] * 3)


def test_one_diverging_combination_does_not_end_a_sweep(tmp_path, monkeypatch, capsys):
    def one(r, step):
        if r.cfg.lr == 1.0:
            for p in r.params:
                p.data.fill_(float("nan"))
        step(r)

    code, states = sweeping(tmp_path, monkeypatch, "1e-3,1.0,1e-5", one)
    assert (code, states) == (2, ["finished", "failed", "finished"])
    assert "error: lr=1.0: " in capsys.readouterr().err
    monkeypatch.undo()
    assert rows(combinations(["lr=1e-3,1.0,1e-5"]), tmp_path / "s")[1]["state"] == "failed"
    assert sweeping(tmp_path, monkeypatch, "1e-3,1.0,1e-5", lambda r, step: step(r)) == (0, ["finished"] * 3)
    assert json.loads((tmp_path / "s/failed.json").read_text()) == {}
