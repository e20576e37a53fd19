"""Everything that `make test` does.

    python tools/test.py [pytest options]
    python tools/test.py slurm
    python tools/test.py sum

Two lanes of one thread each run beside each other, for half of the tests wait most of the time:
  notebooks  tools/in_step.py (is what is generated in step with its source?), then nbdev_test of every
             notebook
  tests      pytest, without the tests that read a clock or need a SLURM; when the notebooks are through,
             their lane takes files of tests from the other end (tests/share.py)
and then, with nothing beside them:
  alone      the tests that read a clock
By itself (make test-slurm, .ci/run): the tests on a real SLURM of two nodes; they say so when there can be
none.

nbdev_test is believed only where it names each notebook as completed and prints `Success.`. Lessons keep what
they trained in build/lessons, under a hash of package and lesson (`sdcourse.core.lesson_folder`), so that a
second `make test` does not train again; CI and `make fresh` do.

A stage may take as long as the machine needs. What hangs is ended: a test by its own limit (pyproject.toml),
a notebook after half an hour of silence. Each stage leaves its counts in build/results, and the last line is
`N passed, N failed`: notebooks and tests that really ran. A check that fails, a surviving mutant and a stage
without a result count as failed. `sum` prints that line again, with the mutants when they ran. Nothing here
reaches the network: tests/offline blocks it in every process that is started.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "results"
STAGES = ("check", "notebooks", "tests", "alone")
SILENCE = 30 * 60  # seconds without a line: something hangs
ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "PYTHONUNBUFFERED": "1",
    "MPLCONFIGDIR": str(ROOT / "build" / "mpl"),
}
KEPT = {} if os.environ.get("CI") else {"SDCOURSE_KEEP": str(ROOT / "build" / "lessons")}
running = set()


def say(text):
    print(f"\n==== {text}", flush=True)


def keep(stage, passed, failed, **more):
    "Leave the counts of a stage."
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = {"passed": passed, "failed": failed, **more}
    (RESULTS / f"{stage}.json").write_text(json.dumps(found), encoding="utf-8")
    return failed


def end(child):
    "End a command and everything that it started."
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def stream(argv, tag, **env):
    """Run a command and show its lines as they come, behind a tag; (exit code, all lines). Everything that it
    started ends with it.
    """
    child = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=os.environ | ENV | env,
        text=True,
        errors="replace",
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    running.add(child)
    lines = []
    try:
        timer = _silence(child)
        for line in child.stdout:
            timer.cancel()
            print(f"{tag}| {line}", end="", flush=True)
            lines.append(line.rstrip("\n"))
            timer = _silence(child)
        timer.cancel()
        return child.wait(), lines
    finally:
        end(child)
        running.discard(child)


def _silence(child):
    "A timer that ends a command which says nothing any more."
    timer = threading.Timer(SILENCE, end, [child])
    timer.daemon = True
    timer.start()
    return timer


def expected():
    "The notebooks that nbdev_test has to run."
    nbs = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in nbs if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]


def judge(code, lines, wanted):
    "(passed, problems) of a run of nbdev_test: what it says is believed only where it names the notebook."
    completed = {m[1] for l in lines if (m := re.fullmatch(r"- Completed (.*\.ipynb)", l))}
    where = next((i for i, l in enumerate(lines) if l.startswith("nbdev Tests Failed On")), None)
    failed = [l.strip() for l in lines[where + 2 :] if l.startswith("\t")] if where is not None else []
    missing = [f"{p}: not run" for p in wanted if str(p) not in completed]
    problems = [f"{name}: failed" for name in failed] + missing
    if not problems and (code or "Success." not in lines):
        problems = [f"nbdev_test: exit code {code}, {'no ' * ('Success.' not in lines)}success line"]
    return len(wanted) - len(failed) - len(missing), problems


def notebooks():
    "The lane of the notebooks."
    import in_step

    keep("check", 0, in_step.main())
    command = [
        sys.executable,
        str(Path(sys.executable).with_name("nbdev_test")),
        "--n_workers",
        "1",
        "--do_print",
        "--timing",
    ]
    code, lines = stream(command, "nb", PYTHONPATH=str(ROOT / "tests" / "offline"), **KEPT)
    wanted = expected()
    passed, problems = judge(code, lines, wanted)
    print(f"{passed} of {len(wanted)} notebooks ran and passed", *problems, sep="\n", flush=True)
    return keep("notebooks", passed, len(problems), names=problems)


def pytest(options, name, mark, tag="py"):
    "Run it on what `mark` chooses; {passed, failed, skipped, names of those that failed}."
    report = RESULTS / f"pytest-{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", mark, "--durations=12", f"--junitxml={report}", *options]
    code, _ = stream(command, tag)
    if not report.exists():
        return dict(passed=0, failed=1, skipped=0, names=[f"{name}: pytest ended without a report"])
    suite = xml.parse(report).getroot().find("testsuite")
    count = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    nothing = code == 5 and not count["tests"]  # no test has this mark, or the options leave none
    passed = count["tests"] - failed - count["skipped"]
    failed = failed or int(code != 0 and not nothing)
    return dict(passed=passed, failed=failed, skipped=count["skipped"], names=red(suite))


def red(suite):
    "A line for each test that failed: its name, and the first line of its error."
    lines = []
    for case in suite.iter("testcase"):
        for found in [*case.iter("failure"), *case.iter("error")]:
            told = (found.get("message") or "").strip().partition("\n")[0]
            lines.append(f"{case.get('classname')}::{case.get('name')}: {told[:160]}")
    return lines


def tests(options, stage, mark):
    "One stage of pytest."
    return keep(stage, **pytest(options, stage, mark))


def share(claims, backwards=False):
    "Options of tests/share.py; in one word, or pytest would look for its configuration in that folder."
    return [f"--share={claims}", *(["--backwards"] if backwards else [])]


def lanes(options):
    "Notebooks and tests beside each other; who has run the notebooks takes tests from the other end."
    claims = RESULTS / "claims"
    claims.mkdir()
    mark, parts = "not slurm and not alone", []

    def second():
        notebooks()
        say("the notebooks are through: p2| tests from the other end")
        parts.append(pytest([*share(claims, backwards=True), *options], "tests-2", mark, "p2"))

    lane = threading.Thread(target=second)
    lane.start()
    parts.append(pytest([*share(claims), *options], "tests-1", mark))
    lane.join()
    count = {k: sum(part[k] for part in parts) for k in ("passed", "failed", "skipped")}
    count["names"] = [name for part in parts for name in part["names"]]
    count["failed"] += len(parts) != 2  # a lane that broke has left no counts
    return keep("tests", **count)


def slurm(options):
    "On a real SLURM, or a loud word that there is none."
    failed = tests(["tests/test_slurm.py", *options], "slurm", "slurm")
    if json.loads((RESULTS / "slurm.json").read_text(encoding="utf-8")).get("skipped"):
        need = "they need root, Linux, and Debian's slurm-wlm and munge"
        print(f"!!!! NO SLURM: the tests on a real SLURM were skipped; {need}", flush=True)
    return int(failed > 0)


def told(stage, found):
    "A line on what a stage left."
    if stage == "check":
        return f"check: {found['failed']} failed"
    if stage == "mutants":
        kept = f", {found['kept']} caught before" if found.get("kept") else ""
        return f"mutants: {found['caught']} of {found['total']} caught{kept}"
    skipped = f", {found['skipped']} skipped" if found.get("skipped") else ""
    return f"{stage}: {found['passed']} passed, {found['failed']} failed{skipped}"


def total():
    "The last line, from what the stages left."
    good = bad = 0
    for stage in (*STAGES, "slurm", "mutants"):
        path = RESULTS / f"{stage}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            print(told(stage, found))
            good += found["passed"]
            bad += found["failed"]
            for name in found.get("names", ()):
                print(f"  {name}")
        elif stage in STAGES:
            print(f"{stage}: no result")
            bad += 1
    print(f"{good} passed, {bad} failed", flush=True)
    return int(bad > 0 or good == 0)


def leave(*_):
    "What was started ends with this process."
    for child in list(running):
        end(child)
    os._exit(143)


def main(options):
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, leave)
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    start = time.time()
    say("two lanes, one thread each: nb| notebooks, py| tests")
    lanes(options)
    say(f"{time.time() - start:.0f} s: both lanes are through; tests that read a clock")
    tests(options, "alone", "alone")
    say("start-up times and sizes (printed, not tested)")
    subprocess.run([sys.executable, "tools/budgets.py"], cwd=ROOT)
    say(f"{time.time() - start:.0f} s in all")
    return total()


if __name__ == "__main__":
    mode, rest = sys.argv[1:2], sys.argv[2:]
    if mode == ["sum"]:
        raise SystemExit(total())
    if mode == ["slurm"]:
        raise SystemExit(slurm(rest))
    raise SystemExit(main(sys.argv[1:]))
