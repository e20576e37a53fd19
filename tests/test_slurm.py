"""On a real SLURM with two nodes: the batch scripts, stops, requeues, arrays, chains, and a lost node."""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

import cluster
from sdcourse.engine.checkpoint import latest_checkpoint, load_checkpoint, verify_checkpoint
from sdcourse.engine.trackers import read_metrics

ROOT = Path(__file__).resolve().parent.parent
PREEMPT = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=20
PartitionName=high Nodes=ALL PriorityTier=10"""
SILENT = "--num-samples 0 --num-inference-steps 2"
TINY = f"flow_dit --preset tiny --precision fp64 --threads 1 {SILENT} --device cpu".split()
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm():
    "A cluster of two nodes; an `scontrol` that notes each requeue before it does it."
    if why := cluster.missing():
        pytest.skip(f"NO SLURM TEST: {why}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "bin").mkdir()
    real = shutil.which("scontrol", path=cluster.PATH)
    (folder / "bin/scontrol").write_text(f"""#!/bin/sh
[ "$1" = requeue ] && echo "$2" >>{folder}/requeued
exec {real} "$@"
""")
    (folder / "bin/scontrol").chmod(0o755)
    try:
        with cluster.Cluster(folder / "c", extra=PREEMPT) as found:
            found.folder = folder
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Submit:
    """Jobs of one test: its own folder for what sbatch writes, the project's scripts, and notes of the ids of
    each step.
    """

    def __init__(self, slurm, tmp):
        self.slurm, self.tmp = slurm, tmp

    def __call__(self, script, *words, nodes=2, tasks=1, sbatch=(), **env):
        env = (
            dict(
                SDCOURSE_CLUSTER="slurm/cpu.env",
                PYTHON=f"{sys.executable} {ROOT}/tests/recorded.py" if script == "train" else sys.executable,
                RECORDED=str(self.tmp / "ids"),
                HF_HUB_OFFLINE="1",
                WANDB_MODE="offline",
                PYTHONPATH=f"{ROOT / 'tests/offline'}:{ROOT}",
                PATH=f"{self.slurm.folder}/bin:{cluster.PATH}",
            )
            | env
        )
        return self.slurm.sbatch(
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks}",
            f"--output={self.tmp}/%x-%j.out",
            *sbatch,
            ROOT / f"slurm/{script}.sbatch",
            *words,
            cwd=ROOT,
            **env,
        )

    def requeued(self):
        "The job ids that `scontrol requeue` was called with."
        path = self.slurm.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def ids(self, ranks=2, folder="ids"):
        "step -> the ids of the global batch."
        parts = [
            dict(json.loads(l) for l in (self.tmp / folder / f"rank-{r}.jsonl").read_text().splitlines())
            for r in range(ranks)
        ]
        assert all(p.keys() == parts[0].keys() for p in parts)
        return {s: [i for p in parts for i in p[s]] for s in parts[0]}


@pytest.fixture
def submit(slurm, tmp_path):
    yield Submit(slurm, tmp_path)
    slurm.run("scancel", "--full", "-u", "root", "-s", "KILL", check=False)


def reach(out, step):
    "Until the log of a run has a row of this step."
    end = time.monotonic() + 300
    while not [r for r in read_metrics(out) if r["step"] >= step]:
        assert time.monotonic() < end, "\n".join(p.read_text()[-1500:] for p in out.glob("*.log"))
        time.sleep(0.1)


def tensors(out, step=None):
    return load_checkpoint(
        out / f"checkpoints/step-{step:08}" if step else latest_checkpoint(out / "checkpoints")[0]
    )


def log(out):
    return "\n".join(p.read_text() for p in sorted(out.glob("slurm-*.log")))


def distance(a, b):
    return max(
        (a["tensors"][n][k] - b["tensors"][n][k]).abs().max().item()
        for n in a["tensors"]
        for k in a["tensors"][n]
    )


def equal(a, b):
    return all(
        torch.equal(a["tensors"][n][k], b["tensors"][n][k]) for n in ("model", "ema") for k in a["tensors"][n]
    )


def short(out, steps, *more):
    "Words for a short training whose schedule does not depend on chance."
    return [
        *TINY,
        "--max-steps",
        str(steps),
        "--warmup-steps",
        "5",
        "--log-every",
        "1",
        "--checkpoint-every",
        "0",
        "--out",
        str(out),
        *more,
    ]


def test_two_nodes_equal_one_process(slurm, submit, tmp_path):
    """O2: 20 steps in float64 on two nodes and in one process: the same ids in every step, weights and losses
    to 1e-9.
    """
    two = submit("train", *short(tmp_path / "two", 20))
    one = submit("train", *short(tmp_path / "one", 20), nodes=1, RECORDED=str(tmp_path / "alone"))
    slurm.wait(two), slurm.wait(one)
    assert distance(tensors(tmp_path / "one"), tensors(tmp_path / "two")) <= 1e-9
    assert submit.ids() == submit.ids(1, "alone") and len(submit.ids()) == 20
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-9
    assert {json.loads((tmp_path / f"ids/rank-{r}.json").read_text())["host"] for r in (0, 1)} == {"n1", "n2"}
    assert "ranks 2" in log(tmp_path / "two") and "ranks 1" in log(tmp_path / "one")


def test_the_whole_tiny_training_on_two_nodes(slurm, submit, tmp_path):
    """O2: `make train` as it is, 1,500 steps in float32: the same ids in every step, and losses that agree to
    1e-3.
    """
    words = f"flow_dit --preset tiny --threads 1 {SILENT} --log-every 10 --device cpu --out".split()
    slurm.wait(
        submit("train", *words, tmp_path / "two")
    )  # three processes on two cores would wait for each other in every step
    slurm.wait(submit("train", *words, tmp_path / "one", nodes=1, RECORDED=str(tmp_path / "alone")))
    ids, alone = submit.ids(), submit.ids(1, "alone")
    assert ids == alone and len(ids) == 1500 and all(len(i) == 64 for i in ids.values())
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-3 * a["loss"]


def test_two_nodes_with_two_ranks_each_see_every_item_once(slurm, submit, tmp_path):
    """D2 for world 4 = 2 x 2: 1,437 digits, a batch of 64 that does not divide them; the first epoch is every
    digit once.
    """
    job = submit("train", *short(tmp_path / "run", 46), tasks=2)
    slurm.wait(job)
    stream = [i for s, batch in sorted(submit.ids(4).items()) for i in batch]
    assert (
        len(stream) == 46 * 64
        and len(set(stream[:1437])) == 1437
        and sorted(stream[:1437]) == sorted(stream[1437:2874])
    )
    places = [json.loads((tmp_path / f"ids/rank-{r}.json").read_text()) for r in range(4)]
    assert [p["host"] for p in places] == ["n1", "n1", "n2", "n2"]


def test_a_job_that_reaches_its_time_limit(slurm, submit, tmp_path):
    "R9: the scheduler's own signal, one requeue, and weights that are bitwise those of an uninterrupted run."
    job = submit(
        "train", *short(tmp_path / "run", 36), sbatch=["--time=1", "--signal=USR1@45"], SLOW="1.6"
    )  # more work than fits into the minute
    whole = submit("train", *short(tmp_path / "whole", 36), RECORDED=str(tmp_path / "ids-whole"))
    slurm.wait(whole)
    found = slurm.wait(job)
    assert int(found["Restarts"]) >= 1 and submit.requeued().count(job) == int(found["Restarts"])
    assert equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole")) and submit.ids() == submit.ids(
        folder="ids-whole"
    )
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(
        range(1, 37)
    )  # no row lost, none twice
    # SLURM sends the signal at a time of its own, perhaps before Python listens; then the end of the job is
    # the deadline
    text = log(tmp_path / "run")
    assert re.search("stopped by (SIGUSR1|end of the job)", text)
    assert text.count("is requeued") == int(found["Restarts"])


def test_a_stop_in_the_middle_is_requeued_once_and_the_tracker_goes_on(slurm, submit, tmp_path):
    """R7 to R9: the signal reaches one rank only; both save the same step; one requeue; one W&B run; then
    nothing is left to do.
    """
    words = short(tmp_path / "run", 40, "--tracker", "wandb")
    job = submit("train", *words, SLOW="0.3")
    reach(tmp_path / "run", 5)
    first = json.loads((tmp_path / "run/tracker.json").read_text())
    end = json.loads((tmp_path / "ids/rank-1.json").read_text())["SLURM_JOB_END_TIME"]
    os.kill(json.loads((tmp_path / "ids/rank-1.json").read_text())["pid"], 10)  # SIGUSR1
    found = slurm.wait(job)
    assert found["Restarts"] == "1" and submit.requeued().count(job) == 1 and found["ExitCode"] == "0:0"
    assert (
        re.search(r"stopped by SIGUSR1 at step (\d+) of 40", log(tmp_path / "run"))
        and "== job" in log(tmp_path / "run")
        and "start 2" in log(tmp_path / "run")
    )
    assert (
        json.loads((tmp_path / "run/tracker.json").read_text()) == first
        and len(list((tmp_path / "run/wandb").glob(f"offline-run-*-{first['wandb_id']}"))) == 2
    )
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == list(range(1, 41))
    assert end is None or int(end) > time.time() + 1e6  # no limit was asked for
    before = len((tmp_path / "ids/rank-0.jsonl").read_text())
    slurm.wait(submit("train", *words, sbatch=["--time=10"]))
    assert len((tmp_path / "ids/rank-0.jsonl").read_text()) == before  # R12: 0 steps, exit code 0
    assert (
        400
        < int(json.loads((tmp_path / "ids/rank-1.json").read_text())["SLURM_JOB_END_TIME"]) - time.time()
        < 700
    )


def test_scancel_and_stop_file(slurm, submit, tmp_path):
    "Both leave a valid checkpoint of the step in which they came and requeue nothing."
    job = submit("train", *short(tmp_path / "run", 200), SLOW="0.3")
    reach(tmp_path / "run", 4)
    slurm.run("scancel", job)
    slurm.wait(job, "CANCELLED")
    path, skipped = latest_checkpoint(tmp_path / "run/checkpoints")
    verify_checkpoint(path)
    rows = read_metrics(tmp_path / "run")
    assert (
        not skipped
        and int(path.name[5:]) == rows[-1]["step"] >= 4
        and job not in submit.requeued()
        and "was cancelled" in log(tmp_path / "run")
    )
    again = submit("train", *short(tmp_path / "run", 200), SLOW="0.3")
    reach(tmp_path / "run", rows[-1]["step"] + 2)
    (tmp_path / "run/STOP").touch()
    assert slurm.wait(again, "COMPLETED")["ExitCode"] == "0:0" and again not in submit.requeued()
    assert (
        int(latest_checkpoint(tmp_path / "run/checkpoints")[0].name[5:])
        == read_metrics(tmp_path / "run")[-1]["step"]
        < 200
        and not (tmp_path / "run/STOP").exists()
    )


def test_a_job_that_must_give_way(slurm, submit, tmp_path):
    """Preemption: the ranks get SIGTERM and 20 seconds. SLURM itself would not requeue a job that leaves
    politely in that time; the script does, once.
    """
    job = submit("train", *short(tmp_path / "run", 40), SLOW="0.3", sbatch=["--partition=low", "--exclusive"])
    reach(tmp_path / "run", 5)
    other = slurm.sbatch(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"
    )
    slurm.wait(other)
    assert slurm.wait(job)["Restarts"] == "1" and submit.requeued().count(job) == 1
    assert "stopped by SIGTERM" in log(tmp_path / "run") and [
        r["step"] for r in read_metrics(tmp_path / "run")
    ] == list(range(1, 41))


def test_a_chain_waits_for_the_requeued_one(slurm, submit, tmp_path):
    """afterok: the second training goes on from the first one's folder, and starts only when that has really
    ended.
    """
    first = submit("train", *short(tmp_path / "run", 20), nodes=1, SLOW="0.3")
    second = submit(
        "train",
        *short(tmp_path / "run", 30),
        "--force",
        nodes=1,
        sbatch=[f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes"],
    )
    reach(tmp_path / "run", 3)
    slurm.run("scancel", "-s", "USR1", first)
    slurm.wait(second)
    assert (
        slurm.show(first)["JobState"] == "COMPLETED"
        and submit.requeued().count(first) == int(slurm.show(first)["Restarts"]) == 1
    )
    assert latest_checkpoint(tmp_path / "run/checkpoints")[0].name == "step-00000030" and log(
        tmp_path / "run"
    ).index("finished 20 steps") < log(tmp_path / "run").index("finished 30 steps")


def test_a_lost_node(slurm, submit, tmp_path):
    """The node's power fails; SLURM takes the job back, and it goes on from its last checkpoint to the same
    weights.
    """
    words = [
        w if w != "0" or words_before != "--checkpoint-every" else "5"
        for words_before, w in zip(["", *short(tmp_path / "run", 24)], short(tmp_path / "run", 24))
    ]
    job = submit("train", *words, SLOW="0.4")
    reach(tmp_path / "run", 8)
    slurm.crash("n2")
    slurm.boot("n2")
    found = slurm.wait(job)
    assert int(found["Restarts"]) == 1 and job not in submit.requeued()
    whole = [w if w != str(tmp_path / "run") else str(tmp_path / "whole") for w in words]
    slurm.wait(submit("train", *whole, RECORDED=str(tmp_path / "ids-whole")))
    assert equal(tensors(tmp_path / "run"), tensors(tmp_path / "whole")) and [
        r["step"] for r in read_metrics(tmp_path / "run")
    ] == list(range(1, 25))


def test_a_killed_rank_ends_the_job(slurm, submit, tmp_path):
    """Not requeued, for a crash that repeats would repeat for ever; the checkpoint is valid and the job's
    code says what happened.
    """
    words = short(tmp_path / "run", 200, "--checkpoint-every", "5")
    job = submit("train", *words, SLOW="0.2")
    reach(tmp_path / "run", 7)
    os.kill(json.loads((tmp_path / "ids/rank-1.json").read_text())["pid"], 9)
    found = slurm.wait(job, "FAILED")
    assert found["ExitCode"] == "137:0" and job not in submit.requeued()
    assert int(latest_checkpoint(tmp_path / "run/checkpoints")[0].name[5:]) >= 5


def test_a_sweep(slurm, submit, tmp_path):
    "An array of three, two at a time; one is stopped and comes back under its own id; one table."
    words = [*short(tmp_path, 12)[:-2], "--vary", "density_mean=-0.5,0,0.5", "--out", tmp_path / "sweep"]
    job = submit("sweep", *words, nodes=1, sbatch=["--array=0-2%2"], PYTHON=f"{sys.executable}", SLOW="0")
    slurm.until(lambda: slurm.show(f"{job}_1")["JobState"] in ("RUNNING", "COMPLETED"), 600, "task 1")
    assert slurm.show(f"{job}_2")["JobState"] == "PENDING"
    for k in range(3):
        slurm.wait(f"{job}_{k}")
    rows = json.loads((tmp_path / "sweep/table.json").read_text())
    assert [(r["density_mean"], r["state"]) for r in rows] == [
        ("-0.5", "finished"),
        ("0", "finished"),
        ("0.5", "finished"),
    ] and len({r["val_loss"] for r in rows}) == 3
    assert (tmp_path / "sweep/table.md").read_text().count("finished") == 3


def test_one_task_of_an_array_is_requeued_under_its_own_id(slurm, submit, tmp_path):
    "R9 for arrays."
    words = [*short(tmp_path, 30)[:-2], "--vary", "seed=1,2", "--out", tmp_path / "sweep"]
    job = submit(
        "sweep",
        *words,
        nodes=1,
        sbatch=["--array=0-1"],
        PYTHON=f"{sys.executable} {ROOT}/tests/recorded.py",
        SLOW="0.3",
    )
    reach(tmp_path / "sweep/seed=2", 3)
    slurm.run("scancel", "-s", "USR1", f"{job}_1")
    for k in (0, 1):
        slurm.wait(f"{job}_{k}")
    assert submit.requeued()[-1:] == [f"{job}_1"] and [
        slurm.show(f"{job}_{k}")["Restarts"] for k in (0, 1)
    ] == ["0", "1"]
    assert [r["state"] for r in json.loads((tmp_path / "sweep/table.json").read_text())] == ["finished"] * 2


def test_what_is_wrong_is_said_before_the_ranks_start(slurm, submit, tmp_path):
    "A misspelt option, a missing file: exit code 2 and one line in the job's own output."
    job = submit("train", "flow_dit", "--max-step", "3", "--out", tmp_path / "run")
    assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert (
        "--max-step: unknown option; did you mean '--max-steps'?"
        in (tmp_path / f"sdcourse-{job}.out").read_text()
        and not (tmp_path / "run").exists()
    )


def test_a_cache_on_two_nodes_goes_on_after_a_requeue(slurm, submit, tmp_path):
    """R7 for caching, by bare srun: both ranks leave between two batches, the job is requeued once and ends
    with the bytes of an uninterrupted one.
    """
    import tiny_models
    from test_fill import content, pictures

    data, vae, out = pictures(tmp_path / "data"), tiny_models.tiny_vae(tmp_path / "vae"), tmp_path / "c"
    words = [
        "latents",
        data,
        out,
        *f"--model {vae} --size 16 --encode-batch 4 --dtype fp32 --shard-bytes 5000 --device cpu".split(),
    ]
    python = f"{sys.executable} {ROOT}/tests/slow_cache.py"
    job = submit("cache", *words, PYTHON=python, SLOW="0.5")
    end = time.monotonic() + 60
    while not list(out.glob("*.safetensors")):
        assert time.monotonic() < end, log(out)
        time.sleep(0.1)
    slurm.run("scancel", "-s", "USR1", job)
    assert slurm.wait(job)["Restarts"] == "1" and submit.requeued().count(job) == 1
    assert "stopped (SIGUSR1)" in log(out) and "rows computed" in log(out)
    slurm.wait(submit("cache", *words[:2], tmp_path / "whole", *words[3:], PYTHON=python, SLOW="0"))
    assert (
        content(out) == content(tmp_path / "whole")
        and len([n for n in content(out) if n.endswith("safetensors")]) == 8
    )


def test_a_pipeline_of_four_jobs(slurm, tmp_path):
    """Cache, train, generate, evaluate by afterok, from one file; two ranks each; the report says what a
    single process says.
    """
    import subprocess
    import tiny_models
    from sdcourse import cli
    from sdcourse.core import read_json
    from test_fill import pictures

    data, vae = pictures(tmp_path / "data", val=12), tiny_models.tiny_vae(tmp_path / "vae")
    here = "--device cpu --threads 1"
    short = (
        "--size tiny/1 --max-steps 4 --batch-size 8 --warmup-steps 0 --num-samples 0 --num-inference-steps 1"
    )
    drawn = "--split val --batch 4 --num-inference-steps 2"
    told = "--split val --extractor tiny-scenes --metrics fd,kid,pairs --draws 5 --pictures 2"
    (tmp_path / "env").write_text(f"""SBATCH=(--nodes=2 --output={tmp_path}/%x-%j.out)
CACHE=(latents {data} {tmp_path}/cache --model {vae} --size 16 --device cpu)
TRAIN=(flow_dit --preset tiny --data {tmp_path}/cache --vae {vae} {short} {here} --out {tmp_path}/run)
GENERATE=({tmp_path}/run {tmp_path}/out --data {data} {drawn} {here})
EVALUATE=({tmp_path}/out --reference {data} {told} {here} --out {tmp_path}/report)
""")
    env = slurm.env | dict(
        SDCOURSE_CLUSTER="slurm/cpu.env",
        PYTHON=sys.executable,
        HF_HUB_OFFLINE="1",
        PYTHONPATH=f"{ROOT / 'tests/offline'}:{ROOT}",
        PATH=f"{slurm.folder}/bin:{cluster.PATH}",
    )
    done = subprocess.run(
        ["slurm/pipeline.sh", tmp_path / "env"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stdout.splitlines())
    assert list(jobs) == ["cache", "train", "generate", "evaluate"]
    slurm.wait(jobs["evaluate"])
    assert (
        all(slurm.show(j)["JobState"] == "COMPLETED" for j in jobs.values())
        and len(list((tmp_path / "out/val").glob("*.png"))) == 12
    )
    words = f"{tmp_path}/out --reference {data} {told} {here} --out {tmp_path}/alone"
    assert cli.main(["evaluate", *words.split()]) == 0
    ours, alone = (
        read_json(tmp_path / name / "evaluation.json")["numbers"]["out"] for name in ("report", "alone")
    )
    assert [n["name"] for n in ours] == [
        "FD[tiny-scenes]",
        "KID[tiny-scenes]",
        "LPIPS[tiny]",
        "PSNR",
        "SSIM",
    ] and all(abs(a["value"] - b["value"]) <= 1e-4 * abs(b["value"]) + 1e-5 for a, b in zip(ours, alone))


def test_a_pipeline_without_words_is_refused(slurm, tmp_path):
    import subprocess

    (tmp_path / "env").write_text("SBATCH=()\n")
    for words, text in (
        ([], "give a readable file"),
        ([tmp_path / "no"], "give a readable file"),
        ([tmp_path / "env"], "sets none of CAPTION"),
    ):
        done = subprocess.run(
            ["slurm/pipeline.sh", *words], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2 and text in done.stderr and done.stderr.count("\n") == 1
