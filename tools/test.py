"""Everything that `make test` does.   python tools/test.py [pytest options]        python tools/test.py slurm        python tools/test.py sum

check      tools/check.py: what is generated is in step with its source
notebooks  nbdev_test of every notebook, one worker, two threads; it must name each notebook as completed and print `Success.`
tests      pytest without those that need a SLURM, with every skipped test named
slurm      by itself (make test-slurm, .ci/run): the tests on a real two-node SLURM; they say so when there can be none

Each stage leaves its counts in build/results, and the last line is `N passed, N failed`: notebooks and tests that really ran. A check that
fails, a surviving mutant and a stage without a result count as failed. `sum` prints that line again, with the mutants when they ran.
Nothing here reaches the network: tests/offline blocks it in every process that is started.
"""
import json, os, re, signal, subprocess, sys, time
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "results"
STAGES = ("check", "notebooks", "tests")
LIMITS = {"notebooks": 25 * 60, "tests": 25 * 60, "slurm": 15 * 60} # seconds; a hang is a failure, not a wait
ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1", "MPLCONFIGDIR": str(ROOT / "build" / "mpl")}


def say(text): print(f"\n==== {text}", flush=True)


def keep(stage, passed, failed, **more):
    "Leave the counts of a stage."
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{stage}.json").write_text(json.dumps({"passed": passed, "failed": failed, **more}), encoding="utf-8")
    return failed


def stream(argv, limit, **env):
    "Run a command, show its lines as they come; (exit code, all lines). Everything that it started ends with it."
    child = subprocess.Popen(argv, cwd=ROOT, env=os.environ | ENV | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
    def end(*_): os.killpg(child.pid, signal.SIGKILL)
    lines = []
    signal.signal(signal.SIGALRM, end)
    signal.alarm(limit)
    try:
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
        return child.wait(), lines
    finally:
        signal.alarm(0)
        if child.poll() is None: end()


def expected():
    "The notebooks that nbdev_test has to run."
    nbs = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [p for p in nbs if not any(part[0] in "._" for part in p.relative_to(ROOT).parts)]


def judge(code, lines, wanted):
    "(passed, problems) of a run of nbdev_test: what it says is believed only where it names the notebook."
    completed = {m[1] for l in lines if (m := re.fullmatch(r"- Completed (.*\.ipynb)", l))}
    where = next((i for i, l in enumerate(lines) if l.startswith("nbdev Tests Failed On")), None)
    failed = [l.strip() for l in lines[where + 2:] if l.startswith("\t")] if where is not None else []
    missing = [f"{p}: not run" for p in wanted if str(p) not in completed]
    problems = [f"{name}: failed" for name in failed] + missing
    if not problems and (code or "Success." not in lines): problems = [f"nbdev_test: exit code {code}, {'no ' * ('Success.' not in lines)}success line"]
    return len(wanted) - len(failed) - len(missing), problems


def notebooks():
    say("notebooks: nbdev_test --n_workers 1")
    command = [sys.executable, str(Path(sys.executable).with_name("nbdev_test")), "--n_workers", "1", "--do_print", "--timing"]
    code, lines = stream(command, LIMITS["notebooks"], PYTHONPATH=str(ROOT / "tests" / "offline"))
    wanted = expected()
    passed, problems = judge(code, lines, wanted)
    print(f"{passed} of {len(wanted)} notebooks ran and passed", *problems, sep="\n", flush=True)
    return keep("notebooks", passed, len(problems))


def tests(options, stage="tests", mark="not slurm"):
    say(f"{stage}: pytest")
    report = RESULTS / f"pytest-{stage}.xml"
    report.unlink(missing_ok=True)
    code, _ = stream([sys.executable, "-m", "pytest", "-m", mark, "--durations=8", f"--junitxml={report}", *options], LIMITS[stage])
    if not report.exists(): return keep(stage, 0, 1)
    suite = xml.parse(report).getroot().find("testsuite")
    count = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return keep(stage, count["tests"] - failed - count["skipped"], failed or int(code != 0), skipped=count["skipped"])


def slurm(options):
    "On a real SLURM, or a loud word that there is none."
    failed = tests(["tests/test_slurm.py", *options], "slurm", "slurm")
    if json.loads((RESULTS / "slurm.json").read_text(encoding="utf-8")).get("skipped"): print("!!!! NO SLURM: the tests on a real SLURM were skipped; they need root, Linux, and Debian's slurm-wlm and munge", flush=True)
    return int(failed > 0)


def checks():
    say("check: generated files")
    import check
    return keep("check", 0, check.main())


def total():
    "The last line, from what the stages left."
    bad = good = 0
    for stage in (*STAGES, "slurm", "mutants"):
        path = RESULTS / f"{stage}.json"
        if not path.exists():
            if stage not in STAGES: continue
            print(f"{stage}: no result")
            bad += 1
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        more = f", {found['skipped']} skipped" if found.get("skipped") else ""
        print(f"{stage}: " + (f"{found['failed']} failed" if stage == "check" else f"{found['caught']} of {found['total']} caught" if stage == "mutants" else f"{found['passed']} passed, {found['failed']} failed{more}"))
        good, bad = good + found["passed"], bad + found["failed"]
    print(f"{good} passed, {bad} failed", flush=True)
    return int(bad > 0 or good == 0)


def main(options):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)) # so that what was started ends too
    for old in RESULTS.glob("*"): old.unlink()
    RESULTS.mkdir(parents=True, exist_ok=True)
    start = time.time()
    checks(); notebooks(); tests(options)
    say("start-up times and sizes (printed, not tested)")
    subprocess.run([sys.executable, "tools/budgets.py"], cwd=ROOT)
    say(f"{time.time() - start:.0f} s in all")
    return total()


if __name__ == "__main__":
    raise SystemExit(total() if sys.argv[1:] == ["sum"] else slurm(sys.argv[2:]) if sys.argv[1:2] == ["slurm"] else main(sys.argv[1:]))
