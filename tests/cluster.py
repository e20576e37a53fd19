"""A real SLURM on this machine, loopback only: munged, slurmctld and one slurmd per virtual node.

    with Cluster(tmp) as slurm:
        job = slurm.sbatch("-N2", "slurm/train.sbatch", "flow_dit", …)
        slurm.wait(job, "COMPLETED")

Each daemon lives in UTS and mount namespaces of its own, in which the host name is that of its node and a
private /etc/hosts maps all names to 127.0.0.1. So jobs see nodes called n1 and n2 while nothing outside the
folder changes. Needs root on Linux and Debian's packages `slurm-wlm munge`.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

DAEMONS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "scontrol",
    "squeue",
    "scancel",
    "sinfo",
    "unshare",
    "mount",
)
PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
CONF = """
ClusterName=loopback
SlurmctldHost=slurmctl(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
MinJobAge=1000000
JobRequeue=1
EnforcePartLimits=ALL
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmctldTimeout=20
SlurmdTimeout=20
KillWait=20
"""


def missing():
    "Why there can be no cluster here; empty when there can."
    lacking = [d for d in DAEMONS if not shutil.which(d, path=PATH)]
    if lacking:
        return f"{lacking[0]} is not installed (apt-get install slurm-wlm munge)"
    if os.geteuid():
        return "only root may start the daemons"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this container may not make namespaces"
    return ""


def free_ports(n):
    "The first of `n` free ports in a row."
    for base in range(
        20000 + os.getpid() % 1000 * 10, 32000, 10
    ):  # below what the system gives out; two clusters that start together begin elsewhere
        try:
            for p in range(base, base + n):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", p))
            return base
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Cluster:
    def __init__(self, folder, nodes=2, cpus=4, extra=""):
        self.dir, self.names, self.daemons = Path(folder), [f"n{i + 1}" for i in range(nodes)], {}
        if len(str(self.dir)) > 64:
            raise RuntimeError(f"{self.dir}: too long a name for Unix sockets")
        port = free_ports(nodes + 1)
        lines = [
            f"NodeName={n} NodeAddr=127.0.0.1 Port={port + 1 + i} CPUs={cpus} RealMemory=262144 State=UNKNOWN"
            for i, n in enumerate(self.names)
        ]
        self.conf = CONF.format(
            port=port, dir=self.dir, first=100 * (os.getpid() % 600 + 1)
        )  # ranks meet at a port that depends on the job id, and all clusters of a machine share its ports
        self.conf += "\n".join(
            [*lines, "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", extra, ""]
        )
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))} | dict(
            PATH=PATH, SLURM_CONF=str(self.dir / "slurm.conf"), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"
        )

    # ---- daemons
    def spawn(self, name, host, *command):
        "A daemon in its own session and namespaces, on a host of its own name."
        inside = (
            'echo "$1" >/proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        )
        with open(self.dir / f"{name}.out", "a") as out:
            self.daemons[name] = subprocess.Popen(
                [
                    "unshare",
                    "--uts",
                    "--mount",
                    "--propagation",
                    "slave",
                    "--",
                    "sh",
                    "-c",
                    inside,
                    "sh",
                    host,
                    str(self.dir / f"hosts-{host}"),
                    *map(str, command),
                ],
                env=dict(PATH=PATH, LC_ALL="C"),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def boot(self, node):
        self.spawn(f"slurmd-{node}", node, "slurmd", "-D", "-N", node, "-f", self.dir / "slurm.conf")

    def crash(self, node):
        """Everything on a node is gone at once, as when the power fails; SLURM is told so, or the test would
        wait for its timeout.
        """
        for pid in self.processes(node):
            os.kill(pid, signal.SIGKILL)
        self.daemons.pop(f"slurmd-{node}").wait()
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=power")

    def processes(self, host="[^ /]*"):
        "Pids of all processes that live in a namespace of ours."
        found = []
        for p in Path("/proc").glob("[0-9]*/mountinfo"):
            try:
                text = p.read_text()
            except OSError:
                continue
            if any(
                f"{self.dir.name}/hosts-" in line
                and re.search(rf"/hosts-{host}(//deleted)? /etc/hosts ", line)
                for line in text.splitlines()
            ):
                found.append(int(p.parent.name))
        return found

    def __enter__(self):
        self.dir.mkdir(parents=True, exist_ok=True)
        self.dir.chmod(0o755)
        (self.dir / "state").mkdir()
        (self.dir / "slurm.conf").write_text(self.conf)
        (self.dir / "munge.key").write_bytes(os.urandom(128))
        (self.dir / "munge.key").chmod(0o600)
        for host in ("slurmctl", *self.names):
            (self.dir / f"hosts-{host}").write_text(
                f"127.0.0.1 {host}\n127.0.0.1 localhost slurmctl {' '.join(self.names)}\n"
            )
        try:
            self.spawn(
                "munged",
                "slurmctl",
                "munged",
                "--foreground",
                "--force",
                f"--key-file={self.dir}/munge.key",
                f"--socket={self.dir}/munge.sock",
                f"--pid-file={self.dir}/munged.pid",
                f"--seed-file={self.dir}/munge.seed",
                f"--log-file={self.dir}/munged.log",
            )
            self.until(
                lambda: (
                    not subprocess.run(
                        ["munge", "-S", self.dir / "munge.sock", "-n"], capture_output=True
                    ).returncode
                ),
                120,
                "munged",
            )
            self.spawn("slurmctld", "slurmctl", "slurmctld", "-D", "-f", self.dir / "slurm.conf")
            for n in self.names:
                (self.dir / f"spool-{n}").mkdir()
                self.boot(n)
            self.until(self.ready, 300, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def ready(self):
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%t", check=False).split()
        return len(states) == len(self.names) and set(states) <= {"idle", "mix", "alloc"}

    def __exit__(self, *_):
        for d in self.daemons.values():
            if d.poll() is None:
                d.terminate()
        for _ in range(50):
            left = self.processes()
            if not left:
                break
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)
        for d in self.daemons.values():
            d.wait()

    # ---- what tests do
    def run(self, *argv, check=True, **env):
        done = subprocess.run(
            list(map(str, argv)), env=self.env | env, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, argv))}: {done.stderr}")
        return done.stdout

    def sbatch(self, *argv, cwd=None, **env):
        "Submit; the job's id."
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, argv)],
            env=self.env | env,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def show(self, job):
        'What SLURM knows of a job, or of one task of an array ("7_2").'
        return dict(
            re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", job).splitlines()[0])
        )

    def until(self, there, seconds, what):
        "Poll."
        end = time.monotonic() + seconds
        while True:
            try:
                if there():
                    return
            except RuntimeError:
                pass
            if time.monotonic() > end:
                raise AssertionError(
                    f"{what}: not within {seconds} s\n"
                    + "\n".join(f"-- {p.name}\n{p.read_text()[-800:]}" for p in self.dir.glob("*.out"))
                )
            time.sleep(0.2)

    def wait(
        self, job, state="COMPLETED", seconds=600
    ):  # a slow machine needs minutes for what a quick one does in seconds
        "Until a job is in a final state, which must be `state`; what SLURM knows of it."
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.until(
            lambda: (
                self.show(job)["JobState"] in final
                and not self.run("squeue", "-h", "-j", job.split("_")[0], "-t", "R,CG,PD").strip()
            ),
            seconds,
            f"the end of job {job}",
        )
        found = self.show(job)
        assert found["JobState"] == state, (found["JobState"], found)
        return found
