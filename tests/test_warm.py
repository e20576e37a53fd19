"""Processes that are forked from a warm parent are as good as started ones."""

import os
import signal
import subprocess
import sys
import time

import pytest

import warm

SAYS = """
import os, sys, threading
print(sys.argv, os.getcwd(), os.environ.get("COLOUR"), os.environ.get("HOME"), __name__, sys.path[0])
print(os.getsid(0) == os.getpid(), threading.active_count(), len(os.listdir("/proc/self/task")))
print("a word", file=sys.stderr)
import atexit; atexit.register(print, "the end")
"""


def started(argv, **how):
    return subprocess.run(
        [sys.executable, *argv], capture_output=True, text=True, start_new_session=True, **how
    )


def test_it_is_what_a_started_process_is(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "HOME"} | {"COLOUR": "red"}
    (tmp_path / "says.py").write_text(SAYS)
    for argv in (["-c", SAYS, "a", "b c"], [str(tmp_path / "says.py"), "a"], ["-m", "says", "a"]):
        got, want = (do(argv, env=env, cwd=tmp_path) for do in (warm.run, started))
        assert (
            (got.returncode, got.stdout, got.stderr)
            == (want.returncode, want.stdout, want.stderr)
            == (0, want.stdout, "a word\n")
        )


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(7)",
        "import sys; sys.exit('no')",
        "import sys; sys.exit()",
        "1 / 0",
        "import os; os._exit(69)",
        "import os; os.kill(os.getpid(), 15)",
        "def",
    ],
)
def test_it_ends_as_a_started_process_does(code):
    got, want = warm.run(["-c", code]), started(["-c", code])
    assert got.returncode == want.returncode and got.stderr.splitlines()[-1:] == want.stderr.splitlines()[-1:]


def test_signals_and_kills_reach_it():
    code = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
print('ready', flush=True)
time.sleep(1000)
"""
    for number, end in ((signal.SIGUSR1, 5), (signal.SIGKILL, -9), (signal.SIGTERM, -15)):
        child = warm.start(["-c", code])
        while not child.said():
            assert child.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.01)
        child.send_signal(number)
        assert child.communicate() == ("ready\n", "") and child.returncode == end


def test_the_parent_can_be_forked_and_its_children_compute(monkeypatch):
    "Every kind of parent has one thread; a child may use two, and processes that read data."
    monkeypatch.setattr(warm, "_parents", {})  # one that has imported nothing yet
    code = """
import os, sys, torch
print('torch._dynamo' in sys.modules, 'diffusers' in sys.modules, len(os.listdir('/proc/self/task')))
torch.set_num_threads(2)
x = torch.randn(500, 500)
read = torch.utils.data.DataLoader(range(8), num_workers=2)
print(bool((x @ x).isfinite().all()), len(list(read)))
"""
    for first in (warm.LOOP, warm.MODELS):
        assert warm.run(["-c", code], first=first).stdout == f"True {first == warm.MODELS} 1\nTrue 8\n"


def test_the_parent_ends_with_who_started_it():
    import psutil

    code = """
import sys, warm
child = warm.start(['-c', 'import time; time.sleep(1000)'], first='')
print(warm._parent().process.pid, child.pid, flush=True)
sys.stdin.read()
"""
    one = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.path.dirname(warm.__file__)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    both = [psutil.Process(int(pid)) for pid in one.stdout.readline().split()]
    one.kill()
    one.communicate()
    gone = lambda p: (
        not p.is_running() or p.status() == psutil.STATUS_ZOMBIE
    )  # nobody may be there to bury it
    end = time.monotonic() + 60
    while not all(map(gone, both)) and time.monotonic() < end:
        time.sleep(0.01)
    left = [p for p in both if not gone(p)]
    for p in left:
        p.kill()
    assert not left
