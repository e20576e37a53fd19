"""The resolver: what each launcher sets, what is wrong, what is partial; real torchrun and accelerate launch;
and which part of the work a rank takes.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ranks
import warm
from sdcourse.core import UserError
from sdcourse.engine.dist import Launch, Ranks, _own_gpus, first_host, free_port, gpu_of, join, launched
from sdcourse.engine.order import Order, Plan, micro_rows, rank_rows

TORCHRUN = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="gpu-3", MASTER_PORT="29400")
SRUN = dict(
    SLURM_JOB_ID="4711",
    SLURM_STEP_ID="0",
    SLURM_PROCID="3",
    SLURM_STEP_NUM_TASKS="4",
    SLURM_LOCALID="1",
    SLURM_STEP_NODELIST="gpu-a[007-008]",
    SLURM_NTASKS="4",
    SLURM_NTASKS_PER_NODE="2",
)


def test_the_three_ways():
    assert launched({}) == Launch() and launched({}).by == ""
    me = launched(TORCHRUN)
    assert (me.rank, me.world, me.local_rank, me.addr, me.port, me.by) == (
        5,
        8,
        1,
        "gpu-3",
        29400,
        "torchrun",
    )
    me = launched(SRUN)
    assert (me.rank, me.world, me.local_rank, me.addr, me.port, me.by) == (
        3,
        4,
        1,
        "gpu-a007",
        free_port(4711),
        "srun",
    )


def test_torchrun_inside_srun_counts_as_torchrun():
    assert launched(SRUN | TORCHRUN) == launched(TORCHRUN)


def test_an_address_that_the_user_exports_wins():
    me = launched(SRUN | dict(MASTER_ADDR="10.0.0.7", MASTER_PORT="1234"))
    assert (me.addr, me.port, me.by) == ("10.0.0.7", 1234, "srun")


def test_one_process_of_a_launcher():
    "`srun -n1`, a JupyterLab in a job, torchrun with one process: no rendezvous is needed."
    assert launched(SRUN | dict(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", SLURM_LOCALID="0")).world == 1
    assert launched(dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")).world == 1
    assert (
        launched(dict(SLURM_JOB_ID="1", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0")) == Launch()
    )  # a batch script without srun


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_a_partial_environment_names_the_variable(missing):
    env = {k: v for k, v in TORCHRUN.items() if k != missing}
    with pytest.raises(UserError, match=rf"^{missing} is not set but"):
        launched(env)
    with pytest.raises(UserError, match=rf"^{missing} is not set but"):
        launched(env | {missing: ""})


@pytest.mark.parametrize(
    "missing",
    ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"],
)
def test_a_partial_step_names_the_variable(missing):
    with pytest.raises(UserError, match=rf"^{missing} is not set but"):
        launched({k: v for k, v in SRUN.items() if k != missing})


@pytest.mark.parametrize(
    "over, words",
    [
        (TORCHRUN | dict(RANK="8"), "RANK=8 but WORLD_SIZE=8: ranks go from 0 to 7"),
        (TORCHRUN | dict(WORLD_SIZE="two"), "WORLD_SIZE=two: must be a whole number"),
        (TORCHRUN | dict(RANK="-1"), "RANK=-1"),
        (TORCHRUN | dict(LOCAL_RANK="6"), "LOCAL_RANK=6 is greater than RANK=5"),
        (TORCHRUN | dict(MASTER_PORT="http"), "MASTER_PORT=http"),
        (TORCHRUN | dict(WORLD_SIZE="0", RANK="0", LOCAL_RANK="0"), "WORLD_SIZE=0"),
        (SRUN | dict(SLURM_PROCID="4"), "SLURM_PROCID=4 but SLURM_STEP_NUM_TASKS=4"),
        (
            dict(SLURM_JOB_ID="1", SLURM_NTASKS="4", SLURM_PROCID="0"),
            "SLURM_NTASKS=4 but neither RANK nor SLURM_STEP_ID",
        ),
        (dict(OMPI_COMM_WORLD_SIZE="2"), "OMPI_COMM_WORLD_SIZE=2"),
        (dict(PMI_SIZE="2"), "PMI_SIZE=2"),
        (dict(MASTER_PORT="29500"), "MASTER_PORT is set but RANK is not"),
    ],
)
def test_a_wrong_environment_names_the_variable(over, words):
    with pytest.raises(UserError) as e:
        launched(over)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[1,4-7]", "n1"),
        ("gpu-a[007-010,12],gpu-b3", "gpu-a007"),
        ("n1,n[2-3]", "n1"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("c-[9]", "c-9"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_ports_are_outside_the_ephemeral_range_and_differ_between_neighbours():
    ports = [free_port(job, step) for job in range(1000, 1400) for step in range(5)]
    assert min(ports) >= 10_000 and max(ports) < 32_768 and len(set(ports)) == len(ports)


def test_the_gpu_of_a_rank():
    assert [gpu_of(r, 8) for r in range(8)] == list(range(8)) and gpu_of(
        3, 1
    ) == 0  # --gpus-per-task=1 shows one
    with pytest.raises(UserError, match="local rank 2 has no GPU: this process sees 2"):
        gpu_of(2, 2)
    with pytest.raises(UserError, match="ranks 0 and 2 are on the same GPU of n1"):
        _own_gpus([("n1", "a"), ("n2", "a"), ("n1", "a")])
    _own_gpus([("n1", "a"), ("n1", "b"), ("n2", "a")])


def test_a_process_alone_joins_nothing(monkeypatch):
    import torch.distributed as dist

    me = join("cpu")
    assert (
        (me.rank, me.world, me.control) == (0, 1, None) and not dist.is_initialized() and me.gather(7) == [7]
    )


# ---- who takes what: two nodes with two ranks each
WORLD = [(node, local, 2 * node + local) for node, local in itertools.product(range(2), range(2))]


@pytest.mark.parametrize("shards", [1, 3, 4, 7, 16])
def test_whole_units_go_to_each_global_rank_once(shards):
    """The defect of MetaMorph's SigLIP visualizer was to split by the local rank: both nodes read the same
    half.
    """
    parts = [Ranks(rank=r, world=4, local_rank=local).mine(range(shards)) for _, local, r in WORLD]
    assert (
        sorted(itertools.chain(*parts)) == list(range(shards))
        and max(map(len, parts)) - min(map(len, parts)) <= 1
    )


@pytest.mark.parametrize("items, batch, micro", [(50, 8, 0), (53, 10, 2), (7, 9, 1), (64, 4, 0)])
def test_the_ranks_together_see_every_item_once_per_epoch(items, batch, micro):
    """D2 for world 4 = 2 x 2: exact multiset, sizes that do not divide, batches that straddle epochs, nothing
    padded or dropped.
    """
    order, steps = Order(items, seed=3), 5 * items // batch + 1
    plans = [
        Plan(order, batch, tuple(micro_rows(rank_rows(batch, r, 4), micro)), 0, steps) for _, _, r in WORLD
    ]
    per_step = zip(
        *[
            [sum(p[i : i + len(q.micros)], []) for i in range(0, len(p), len(q.micros))]
            for q in plans
            for p in [list(q)]
        ]
    )
    stream = [item for step in per_step for rank in step for item in rank]
    assert len(stream) == steps * batch
    for epoch in range(len(stream) // items):
        assert sorted(stream[epoch * items : (epoch + 1) * items]) == list(range(items))
    assert np.array_equal(stream, order.items(0, len(stream)))


# ---- real launchers
SAY = """
import json, os, sys
from sdcourse.engine.dist import job, launched
with job(device="cpu") as j:
    facts = j.ranks.gather((j.ranks.rank, j.ranks.local_rank, j.ranks.mine(list(range(5)))))
    if j.ranks.main: print("FACTS", json.dumps([launched().by, facts]))
"""


@pytest.mark.parametrize(
    "head",
    [
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
        ],
    ],
    ids=["torchrun", "accelerate"],
)
def test_real_launchers(tmp_path, head):
    (tmp_path / "say.py").write_text(SAY)
    env = os.environ | dict(OMP_NUM_THREADS="1", HF_HOME=str(tmp_path))
    if "accelerate" in head[1]:
        head = [*head[:-1], str(ranks.free_port())]
    done = subprocess.run(
        [sys.executable, *head, str(tmp_path / "say.py")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(l for l in done.stdout.splitlines() if "FACTS" in l)
    assert json.loads(line.split("FACTS")[1]) == ["torchrun", [[0, 0, [0, 2, 4]], [1, 1, [1, 3]]]]


def test_accelerate_on_a_cpu_alone_is_refused(tmp_path):
    "`accelerate launch --cpu --num_processes 2` starts one process and says nothing; we do."
    (tmp_path / "say.py").write_text(SAY)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--cpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            str(tmp_path / "say.py"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_HOME=str(tmp_path)),
    )
    assert done.returncode != 0 and "MASTER_PORT is set but RANK is not" in done.stderr


def test_ranks_that_do_not_come_and_a_port_that_is_taken(tmp_path):
    import socket

    code = """
import sys
from sdcourse.core import UserError
from sdcourse.engine.dist import join
try: join('cpu', meet=3)
except UserError as e:
    print(e)
    sys.exit(e.code)
"""
    env = os.environ | dict(
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ranks.free_port())
    )
    done = warm.run(["-c", code], env=env)
    assert done.returncode == 69 and "rank 0 of 2 met not all others at 127.0.0.1:" in done.stdout, done
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen()
        port = str(s.getsockname()[1])
        done = warm.run(["-c", code], env=env | dict(MASTER_PORT=port))
    assert done.returncode == 69 and f"port {port} of 127.0.0.1 is taken" in done.stdout, done


def test_one_import_serves_every_long_command():
    "Nobody else reads a launcher's variables."
    root = Path(__file__).resolve().parent.parent / "sdcourse"
    found = {
        p.relative_to(root).as_posix()
        for p in root.rglob("*.py")
        for name in ("WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP", "is_initialized")
        if name in p.read_text()
    }
    assert found <= {"engine/dist.py", "check/lesson09.py"}, found
