"""Plant known bugs, one at a time; each must turn a named test red.

python tests/mutants.py [-j N] [--list] [--seconds S] [word ...]      (words: only mutants whose name or file holds one of them)

A mutant is (name, file, old, new, test): `old` occurs exactly once in `file`. The checkout is copied, the copy is patched, and the named
test runs there, on the copy's own package. Caught means that pytest ran the test and the *test* failed: an import error, a
syntax error, a fixture that breaks or a test that is not there do not count. Every named test is first seen green without a patch.
--seconds S begins no mutant after S seconds and says how many that leaves out; their order then depends on the commit, so that it is not always
the same ones, and their tests are seen green some at a time, so that the time goes to mutants.
"""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, threading, time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import cluster
from planted import PLANTED

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("sdcourse", "tests", "tools", "nbs", "settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LOG.md", "LICENSE", "slurm", "data_manifests", ".ci")
LIMIT = 300 # seconds for one test
SOME = 60 # mutants whose tests are seen green together when time is short

MUTANTS = [(name, file, old, new, f"{tests}::{test}") for (file, tests), rows in PLANTED.items() for name, old, new, test in rows]


def patched(text, old, new, where):
    "The text with the one occurrence of `old` replaced; Python must still compile."
    if text.count(old) != 1: raise SystemExit(f"{where}: {old!r} occurs {text.count(old)} times, and must occur once")
    new = text.replace(old, new)
    if where.endswith(".py"): compile(new, where, "exec")
    return new


def copy(folder):
    "What tests may need, without stored runs and caches."
    skip = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs", "*.gif")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir(): shutil.copytree(source, folder / name, ignore=skip)
        elif source.exists(): shutil.copy(source, folder)


def run(folder, *tests, limit=LIMIT):
    "(verdict, last lines, {test: passed, failed or skipped}) of some tests in a copy: passed, failed, or what went wrong; a single one is left at its first failure."
    report = folder / "report.xml"
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run([sys.executable, "-c", "import sdcourse; print(sdcourse.__file__)"], cwd=folder, env=env, capture_output=True, text=True)
    if found.returncode == 0 and not Path(found.stdout.strip()).is_relative_to(folder): return "the copy is not what is imported", found.stdout, {}
    try: done = subprocess.run([sys.executable, "-m", "pytest", *["-x"][len(tests) - 1:], "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests], cwd=folder, env=env, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired: return f"no end within {limit} s", "", {}
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
    if not report.exists(): return f"pytest exit code {done.returncode}", tail, {}
    suite = xml.parse(report).getroot().find("testsuite")
    ran, failures, errors, skipped = (int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped"))
    how = lambda c: next((word for word in ("skipped", "failure", "error") if c.find(word) is not None), "passed")
    cases = {f"{c.get('classname').replace('.', '/')}.py::{c.get('name')}": how(c) for c in suite.iter("testcase")}
    if done.returncode == 0 and ran > skipped: return "passed", tail, cases
    if done.returncode == 1 and failures and not errors: return "failed", tail, cases
    return ("skipped" if skipped and not failures and not errors else f"not a failing test (exit code {done.returncode}, {errors} errors)"), tail, cases


ONE_CLUSTER = threading.Lock() # two at a time make each other's jobs late


def attempt(*tests, mutant=None):
    "Copy, patch, run; without a patch all tests in one session."
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder, ONE_CLUSTER if any("test_slurm" in t for t in tests) else nullcontext():
        folder = Path(folder).resolve()
        copy(folder)
        if mutant:
            name, file, old, new, _ = mutant
            (folder / file).write_text(patched((folder / file).read_text(encoding="utf-8"), old, new, file), encoding="utf-8")
        return run(folder, *tests, limit=LIMIT if mutant else 4 * LIMIT)


def keep(caught, total):
    "For the last line of .ci/run; an interrupted run leaves the rest as failed."
    out = ROOT / "build" / "results"
    out.mkdir(parents=True, exist_ok=True)
    (out / "mutants.json").write_text(json.dumps({"passed": 0, "failed": total - caught, "caught": caught, "total": total}), encoding="utf-8")


def told(mutant, verdict, tail):
    "A line on a mutant, with the test's last words when it was not caught."
    return f"caught   {mutant[0]}  ({mutant[4]})" if verdict == "failed" else f"SURVIVED {mutant[0]}  ({mutant[4]}): {verdict}\n{tail}"


def skipped_without_patch(mutants, pool):
    "Run the tests of some mutants without a patch; the mutants whose tests are skipped here. One that is red ends everything."
    tests = sorted({m[4] for m in mutants})
    groups = [g for g in ([t for t in tests if "test_slurm" in t], [t for t in tests if "test_slurm" not in t]) if g] # beside each other: one waits, one computes
    cases = {}
    for verdict, tail, found in list(pool.map(lambda g: attempt(*g), groups)):
        red = [c for c, how in found.items() if how in ("failure", "error")]
        if red: verdict, tail, again = attempt(*red); found |= again # once more and alone
        if verdict not in ("passed", "skipped"): raise SystemExit(f"not green without a patch: {verdict}\n{tail}")
        cases |= found
    skipped_of = lambda test: [how == "skipped" for c, how in cases.items() if c == test or c.startswith(test + "[")]
    return [m for m in mutants if all(skipped_of(m[4]) or [False])]


def main(argv=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("words", nargs="*"); ask.add_argument("-j", type=int, default=2); ask.add_argument("--list", action="store_true"); ask.add_argument("--seconds", type=float, default=float("inf"))
    args = ask.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.words or any(w in m[0] or w in m[1] for w in args.words)]
    if not chosen: raise SystemExit(f"no mutant has {' or '.join(args.words)} in its name or file: --list shows all")
    if why := cluster.missing():
        kept = [m for m in chosen if "test_slurm" not in m[4]]
        if len(kept) < len(chosen): print(f"!!!! NO SLURM: {len(chosen) - len(kept)} mutants of the batch scripts are left out ({why})", flush=True)
        chosen = kept
    if args.list: return print(*(f"{file}: {name}  ->  {test}" for name, file, _, _, test in chosen), sep="\n")
    for name, file, old, new, _ in chosen: patched((ROOT / file).read_text(encoding="utf-8"), old, new, file) # all patches fit, before anything runs
    start = time.time()
    if args.seconds < float("inf"):
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        random.Random(head).shuffle(chosen)
    keep(0, len(chosen))
    caught, ran, alive, idle = 0, 0, [], []
    in_time = lambda m: attempt(m[4], mutant=m)[:2] if time.time() - start < args.seconds else ("not begun", "")
    with ThreadPoolExecutor(args.j) as pool:
        print(f"{len(chosen)} mutants, {args.j} at a time", flush=True)
        size = SOME if args.seconds < float("inf") else len(chosen)
        for some in (chosen[i : i + size] for i in range(0, len(chosen), size)):
            if time.time() - start >= args.seconds: break
            skipped = skipped_without_patch(some, pool)
            idle += skipped
            some = [m for m in some if m not in skipped]
            for mutant, (verdict, tail) in zip(some, pool.map(in_time, some)):
                if verdict == "not begun": continue
                caught, ran = caught + (verdict == "failed"), ran + 1
                if verdict != "failed": alive.append(mutant)
                keep(caught, ran)
                print(told(mutant, verdict, tail), flush=True)
    if idle: print(f"!!!! {len(idle)} mutants are left out: their tests are skipped here ({', '.join(sorted({m[4] for m in idle}))})", flush=True)
    for mutant in alive: # once more and alone: a bug that needs bad luck, or a cluster that did not come up beside another one
        verdict, tail, _ = attempt(mutant[4], mutant=mutant)
        caught += verdict == "failed"
        keep(caught, ran)
        print("second try: " + told(mutant, verdict, tail), flush=True)
    if ran < len(chosen) - len(idle): print(f"!!!! {len(chosen) - len(idle) - ran} of {len(chosen)} mutants were not begun within {args.seconds:.0f} s: `make mutants` runs all")
    print(f"{caught}/{ran} mutants caught in {time.time() - start:.0f} s")
    return int(caught < ran or not ran)


if __name__ == "__main__": raise SystemExit(main())
