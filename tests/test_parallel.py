"""in_parallel: all jobs once, errors are results, a stop begins nothing new, nothing outlives its parent."""

import os, signal, subprocess, sys, threading, time

import pytest

from sdcourse.core import UserError
from sdcourse.data.images import BadImage
from sdcourse.data.parallel import in_parallel, processes


class Never:
    reason = ""

    def raised(self):
        return False


class After:
    "Goes up when a condition holds."

    def __init__(self, when):
        self.raised = when


def tenfold(job):
    if job == 3:
        raise ValueError("three")
    return job * 10


def where(_):
    time.sleep(0.02)
    return os.getpid()


class Odd(Exception):
    "Cannot be unpickled: it wants two arguments and keeps one."

    def __init__(self, a, b):
        super().__init__(a)


def raises(what):
    raise {
        "odd": Odd("strange", 2),
        "lock": ValueError(threading.Lock()),
        "bad": BadImage("huge", "large"),
        "disk": OSError(28, "No space left on device", "/x"),
    }[what]


@pytest.mark.parametrize(
    "how",
    [
        dict(workers=1),
        dict(workers=2),
        dict(workers=2, handful=3),
        dict(workers=4, stop=threading.Event()),
        dict(workers=1, stop=threading.Event()),
    ],
    ids=str,
)
def test_all_jobs_once_and_errors_are_results(how):
    got = list(in_parallel(tenfold, range(50), **how))
    assert sorted(j for j, _ in got) == list(range(50))
    got = dict(got)
    assert isinstance(got.pop(3), ValueError) and all(v == k * 10 for k, v in got.items())
    assert list(in_parallel(tenfold, [], **how)) == []


def test_processes_are_others_and_all_of_them_work():
    pids = {r for _, r in in_parallel(where, range(20), workers=2, handful=1)}
    assert len(pids) == 2 and os.getpid() not in pids
    assert {r for _, r in in_parallel(where, range(3), workers=1)} == {os.getpid()}


def test_threads_run_at_the_same_time():
    together = threading.Barrier(3, timeout=60)
    assert [
        r
        for _, r in in_parallel(lambda job: together.wait() >= 0, range(3), workers=3, stop=threading.Event())
    ] == [True] * 3


@pytest.mark.parametrize("workers", [1, 2])
def test_only_little_is_under_way(workers):
    "A million jobs are not taken from the iterator at once."
    taken = []

    def jobs():
        for i in range(10**6):
            taken.append(i)
            yield i

    for n, _ in enumerate(in_parallel(abs, jobs(), workers=workers, handful=4)):
        assert len(taken) <= n + 3 * 2 * 4 + 4
        if n == 100:
            break


def test_errors_travel_between_processes():
    got = dict(in_parallel(raises, ["odd", "bad", "disk", "lock"], workers=2, handful=1))
    assert (
        str(got["odd"]) == "Odd: strange"
        and str(got["lock"]).startswith("ValueError: <unlocked")
        and (got["bad"].kind, got["bad"].detail) == ("huge", "large")
        and got["disk"].errno == 28
        and got["disk"].filename == "/x"
    )


def kill_me(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("end", [os._exit, kill_me])
def test_a_worker_that_is_killed_is_named(end):
    with pytest.raises(UserError, match="--workers 1"):
        list(in_parallel(end, [1] * 4, workers=2))
    with pytest.raises(UserError, match="--workers 1"):
        with processes(2) as pool:
            pool.submit(end, 1).result()


def test_a_stop_begins_no_new_job_and_does_not_wait_for_a_deaf_one():
    begun, release = [], threading.Event()

    def deaf(job):
        begun.append(job)
        release.wait(60)

    start = time.monotonic()
    assert (
        list(
            in_parallel(
                deaf, range(10), workers=2, flag=After(lambda: len(begun) >= 2), stop=threading.Event()
            )
        )
        == []
        and len(begun) == 2
    )
    assert time.monotonic() - start < 40  # the deaf ones take 60
    release.set()
    time.sleep(0.2)
    assert len(begun) == 2


def test_what_is_ready_when_the_stop_comes_is_not_lost():
    stop, begun = threading.Event(), []

    def job(n):
        begun.append(n)
        stop.wait(60)

    assert (
        len(list(in_parallel(job, range(10), workers=2, flag=After(lambda: len(begun) >= 2), stop=stop))) == 2
    )


def test_a_stop_of_processes_gives_what_is_done(tmp_path):
    "Each job leaves a mark; the marks and the results agree, and they are fewer than all."
    got = {
        j
        for j, _ in in_parallel(
            mark,
            [str(tmp_path / str(i)) for i in range(1000)],
            workers=2,
            handful=2,
            flag=After(lambda: len(list(tmp_path.iterdir())) > 8),
        )
    }
    assert {str(p) for p in tmp_path.iterdir()} == got and 0 < len(got) < 1000


def mark(path):
    time.sleep(0.02)
    open(path, "w").close()


def test_who_stops_reading_ends_the_jobs():
    stop = threading.Event()
    for _ in in_parallel(abs, range(100), workers=2, stop=stop):
        break
    assert stop.wait(60)


CHILD = """
import sys, time
from sdcourse.data.parallel import in_parallel
for job, _ in in_parallel(time.sleep, [0.05] * 2000, workers=2, handful=1): print("one", flush=True)
"""


def works(process):
    "Whether it has not ended; a zombie has, and waits for a PID 1 that not every container has."
    import psutil

    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_parent(how):
    import psutil

    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    workers = psutil.Process(child.pid).children()
    child.send_signal(how)
    child.wait()
    assert len(workers) == 2
    until = time.monotonic() + 60
    while (alive := [p for p in workers if works(p)]) and time.monotonic() < until:
        time.sleep(0.05)
    for p in alive:
        p.kill()
    assert not alive


def test_a_signal_for_all_is_left_to_the_parent():
    "As SLURM sends it: to every process; the workers go on."
    with processes(2) as pool:
        pids = {pool.submit(where, 0).result() for _ in range(10)}
        for pid in pids:
            for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(pid, s)
        assert pool.submit(tenfold, 1).result() == 10
