"""`python -m sdcourse.train`: quick help, one line for each mistake, true exit codes, the same object as in
the notebook.
"""

import json, logging, os, subprocess, sys, types
from dataclasses import dataclass
from typing import ClassVar

import pytest
import yaml

import warm
from conftest import spent
from sdcourse import cli
from sdcourse.config import TrainConfig, from_dict, resolve
from sdcourse.core import UserError
from sdcourse.engine.trackers import read_metrics
from sdcourse.train.__main__ import TASKS


@dataclass
class Config(TrainConfig):
    depth: int = 4  # blocks
    presets: ClassVar[dict] = {"tiny": {"max_steps": 10}, "full": {"depth": 28}}


class Result:
    exit_code = 0

    def summary(self):
        return "samples: here"


@pytest.fixture
def trained(monkeypatch):
    "A fake task and a fake engine; the configs that were trained."
    seen = []

    def fake(task):
        logging.getLogger("sdcourse").info("preflight: fits")
        seen.append(task)
        return Result()

    monkeypatch.setitem(TASKS, "toy", "toy_task_module")
    monkeypatch.setitem(
        sys.modules, "toy_task_module", types.SimpleNamespace(Config=Config, Task=lambda cfg: cfg)
    )
    monkeypatch.setitem(sys.modules, "sdcourse.engine.loop", types.SimpleNamespace(train=fake))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return seen


def train(line):
    return cli.main(["train", *line.split()])


def python(*args):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )


# ---- with a fake engine
def test_a_run_gets_the_same_object_as_the_notebook_builds(trained, capsys):
    assert train("toy --preset full --lr 3e-4 --compile") == 0
    assert trained == [
        resolve(Config, preset="full", overrides=dict(lr=3e-4, compile=True, out="runs/toy-full"))
    ]
    out, err = capsys.readouterr()
    assert out == "samples: here\n" and err == "preflight: fits\n"


def test_out_is_kept_when_given(trained):
    train("toy --out here")
    assert trained[0].out == "here"


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_the_results(trained, monkeypatch, code):
    monkeypatch.setattr(Result, "exit_code", code)
    assert train("toy") == code


def test_print_config_is_yaml_that_gives_the_same_object_and_trains_nothing(trained, capsys):
    assert train("toy --preset full --seed 3 --print-config") == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (
        from_dict(Config, found)
        == resolve(Config, preset="full", overrides=dict(seed=3, out="runs/toy-full"))
        and trained == []
    )


@pytest.mark.parametrize(
    "line, words",
    [
        ("", ["no task given", "flow_dit"]),
        ("flow_ditt", ["unknown task", "'flow_dit'"]),
        ("toy --dept 3", ["--dept", "'--depth'"]),
        ("toy --lr fast", ["--lr", "number"]),
        ("toy --preset ful", ["'full'"]),
        ("toy --batch-size 0", ["--batch-size"]),
        ("toy --precision fp16 --device cpu", ["fp16"]),
        ("toy --config no.yaml", ["no.yaml"]),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(trained, capsys, line, words):
    assert train(line) == 2 and trained == []
    out, err = capsys.readouterr()
    assert (
        out == "" and err.startswith("error: ") and err.count("\n") == 1 and all(w in err for w in words)
    ), err


def test_a_refusal_of_the_engine_is_one_line_too(trained, capsys, monkeypatch):
    def refuse(task):
        raise UserError("runs/x: holds other files; choose another --out")

    monkeypatch.setattr(sys.modules["sdcourse.engine.loop"], "train", refuse)
    assert (
        train("toy") == 2
        and capsys.readouterr().err == "error: runs/x: holds other files; choose another --out\n"
    )


def test_a_bug_keeps_its_trace(trained, monkeypatch):
    def bug(task):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["sdcourse.engine.loop"], "train", bug)
    with pytest.raises(ZeroDivisionError):
        train("toy")


def test_more_ranks_than_images_are_refused_before_the_engine(trained, capsys, monkeypatch):
    for k, v in dict(
        RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1234"
    ).items():
        monkeypatch.setenv(k, v)
    assert train("toy --batch-size 2") == 2 and "--batch-size 2" in capsys.readouterr().err


def test_only_rank_0_reports(trained, capsys, monkeypatch):
    for k, v in dict(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1234"
    ).items():
        monkeypatch.setenv(k, v)
    assert train("toy") == 0 and capsys.readouterr() == ("", "")


def test_help_of_a_task_shows_the_presets_defaults(trained, capsys):
    assert train("toy --preset full --help") == 0
    page = " ".join(capsys.readouterr().out.split())
    assert "blocks [a whole number; default 28]" in page and trained == []


def test_the_log_is_left_as_it_was(trained):
    before = list(logging.getLogger("sdcourse").handlers)
    train("toy")
    train("nothing")
    assert logging.getLogger("sdcourse").handlers == before


# ---- real processes
HELP = """
import contextlib, io, json, sys, time
found = {}
HEAVY = {"torch", "numpy", "diffusers", "transformers", "torchvision", "sklearn"}
def took(name, work):
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        try: work()
        except SystemExit as e: assert not e.code
    found[name] = [time.process_time() - start, sorted(HEAVY & set(sys.modules))]
def page(*words):
    from sdcourse.cli import main
    assert main(["train", *words, "--help"]) == 0
took("all", page)
took("torch", lambda: __import__("torch"))
for task in sys.argv[1:]: took(task, lambda: page(task))
print(json.dumps(found))
"""


@pytest.mark.alone
def test_help_is_quick_and_imports_no_torch():
    """The page of all tasks without torch, the page of one with torch and nothing that is slower; in
    processor time, measured by that of importing torch.
    """
    done = python("-c", HELP, *TASKS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["all"][1] == [] and all(found[task][1] == ["numpy", "torch"] for task in TASKS), found
    assert all(found[name][0] < found["torch"][0] / 2 for name in ("all", *TASKS)), found


def test_a_signal_after_the_work_does_not_change_the_exit_code():
    """`srun` sends SIGTERM to all ranks as soon as one leaves with a code other than 0; the others may still
    be on their way out.
    """
    code = """
import atexit, os, runpy, signal, sys
def end():
    for s in (signal.SIGTERM, signal.SIGUSR1): os.kill(os.getpid(), s)
atexit.register(end)
sys.argv[1:] = ['--help']
runpy.run_module('sdcourse.train', run_name='__main__', alter_sys=True)
"""
    assert python("-c", code).returncode == 0


def test_unknown_task_as_a_process():
    done = python("-m", "sdcourse.train", "flow_ditt")
    assert (done.returncode, done.stdout) == (
        2,
        "",
    ) and done.stderr == "error: flow_ditt: unknown task; did you mean 'flow_dit'?\n"


def test_processor_time_is_seen():
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    assert 0.5 <= spent(["-c", busy])[1] < 5


@pytest.mark.parametrize("task", list(TASKS))
def test_smoke_run_leaves_a_whole_run_folder_and_is_not_repeated(task, smoke):
    "U2, as a reader starts it: no more than a minute, whatever else the processor does."
    line, done, seconds, out = smoke(task)
    assert done.returncode == 0, done.stderr
    assert seconds <= 60
    found = {p.name for p in out.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "export", "README.md"} <= found
    rows = read_metrics(out)
    assert rows[-1]["step"] == 30
    if task == "sd15":
        assert rows[0]["loss"] < 0.2  # an untrained model begins at 1
    assert {
        "step",
        "samples",
        "epoch",
        "loss",
        "loss_by_t",
        "grad_norm",
        "lr",
        "images_per_s",
        "mfu",
        "peak_memory_gb",
        "data_wait",
        "skipped",
    } <= set(rows[-1])
    assert list((out / "samples").glob("*.png")) and list((out / "checkpoints").glob("step-00000030"))
    library = "transformers" if task in ("nets", "contrast") else "diffusers"
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["library_name"] == library
    for place in ("samples", "metrics.jsonl", "export"):
        assert place in done.stdout
    again = warm.run(line, first=warm.MODELS)
    assert again.returncode == 0 and read_metrics(out) == rows
    refused = warm.run([*line, "--lr", "0.5"], first=warm.MODELS)
    assert (
        refused.returncode == 2
        and "lr: 0.00" in refused.stderr
        and " -> 0.5" in refused.stderr
        and refused.stderr.count("error: ") == 1
    )


def test_a_refused_run_touches_nothing(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    done = python("-m", "sdcourse.train", "flow_dit", "--out", str(tmp_path))
    assert (
        done.returncode == 2
        and "thesis.tex" in done.stderr
        and [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    )


@pytest.mark.parametrize(
    "e",
    [
        MemoryError(),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes"),
    ],
)
def test_too_little_memory_is_one_line(monkeypatch, capsys, e):
    "What torch says of it is no fault of the program."

    def full(argv):
        raise e

    monkeypatch.setattr(cli, "run", full)
    assert cli.main(["train", "flow_dit"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory (") and "--micro-batch" in said and said.count("\n") == 1


def test_other_faults_of_torch_are_not_hidden(monkeypatch):
    def broken(argv):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        cli.main(["train", "flow_dit"])
