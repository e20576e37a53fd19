"""Plant known bugs, one at a time; each must turn a named test red.

python tests/mutants.py [options] [word ...]      (words: only bugs whose name or file holds one of them)
  -j N           at a time (2)
  --list         the bugs, and nothing else
  --fit          which rows of planted.py do not fit the files any more, and nothing else
  --all          also those with a kept verdict
  --again SHARE  also a random SHARE of them (0.1: another tenth with each commit)
  --seconds S    begins none after S seconds and says how many that leaves out
  --start        each test in a Python of its own start instead of a fork

A bug is (name, file, old, new, test): `old` occurs exactly once in `file`. The checkout is copied, the copy
is patched, and the named test runs there, on the copy's own package (attempt.py). Caught means that pytest
ran the test and the *test* failed: an import error, a syntax error, a fixture that breaks or a test that is
not there do not count. Every named test is first seen green without a patch.

verdicts.txt keeps those that were caught, under a hash of the row, the mutated file, the test file and what
that uses of its folder. They are not tried again until one of these changes; one that survives then is struck
off and fails the run. With CI=true nothing is written there. Bugs of files in the last commits come first,
and then the others, by test file, in an order that depends on the commit.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from itertools import groupby
from pathlib import Path

import cluster
from attempt import LIMIT, Attempt, Lanes, needs_cluster, patched, warm
from planted import PLANTED

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "verdicts.txt"
RECENT = 20  # commits whose files come first

Bug = namedtuple("Bug", "name file old new test")
BUGS = [
    Bug(name, file, old, new, f"{tests}::{test}")
    for (file, tests), rows in PLANTED.items()
    for name, old, new, test in rows
]


# ---- rows
def misfits(bugs):
    "What keeps rows from being planted, a line each."
    found = []
    for bug in bugs:
        try:
            patched((ROOT / bug.file).read_text(encoding="utf-8"), bug.old, bug.new, bug.file)
        except (OSError, SyntaxError, SystemExit) as e:
            found.append(f"{bug.file}: {bug.name}: {e}")
    return found


def told_misfits(bugs):
    "Print them all at once; the exit code."
    wrong = misfits(bugs)
    print(*wrong, f"{len(bugs) - len(wrong)} of {len(bugs)} rows fit", sep="\n", flush=True)
    return int(bool(wrong))


def git(*words):
    'What git says, or "" where there is none.'
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    except OSError:
        return ""


def file_of(test):
    return test.split("::")[0]


def in_order(bugs, recent, seed):
    "Those of `recent` files first; both parts by test file, which are shuffled."
    files = sorted({file_of(b.test) for b in bugs})
    random.Random(seed).shuffle(files)
    first = {b: b.file in recent or file_of(b.test) in recent for b in bugs}
    return sorted(bugs, key=lambda b: (not first[b], files.index(file_of(b.test))))


# ---- verdicts that are kept
@functools.cache
def used_by(path):
    "A test file, conftest.py, and the modules and scripts of its folder that they name, and theirs."
    there = {p.stem: p for p in path.parent.rglob("*.py")}
    there.pop("planted", None)  # only the bug's own row counts
    found, ahead = set(), {path, path.parent / "conftest.py"}
    while ahead:
        found |= ahead
        texts = [p.read_text(encoding="utf-8") for p in ahead if p.exists()]
        imports = re.findall(r"\b(?:from|import)[ \t]+([\w., \t]+)", "\n".join(texts))
        named = re.findall(r"\w+", " ".join(imports)) + re.findall(r"(\w+)\.py\b", "\n".join(texts))
        ahead = {there[name] for name in named if name in there} - found
    return sorted(p for p in found if p.exists())


@functools.cache
def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def key(bug, root=ROOT):
    "What a verdict depends on: the row, the mutated file, the test file, and what that uses of its folder."
    files = [root / bug.file, *used_by(root / file_of(bug.test))]
    words = [bug.file, bug.old, bug.new, bug.test, *map(digest, files)]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def read_table():
    "{(file, name): key} of the bugs that were caught."
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    found = {}
    for line in lines:
        value, file, name = line.split(maxsplit=2)
        found[file.removesuffix(":"), name] = value
    return found


def note(bug, value):
    """Write a verdict: its key, or None for one that is struck off. Bugs that are not planted any more leave
    the table.
    """
    if os.environ.get("CI", "").lower() in ("1", "true"):
        return
    known = {(b.file, b.name) for b in BUGS}
    table = read_table() | {(bug.file, bug.name): value}
    kept = sorted(row for row, v in table.items() if v and row in known)
    lines = [f"{table[file, name]} {file}: {name}\n" for file, name in kept]
    fresh = TABLE.with_name(TABLE.name + ".new")
    fresh.write_text("".join(lines), encoding="utf-8")
    fresh.replace(TABLE)


# ---- the run
class Run:
    "Bugs to try, in lanes, and what came of them."

    def __init__(self, bugs, lanes, seconds, kept):
        self.bugs = bugs
        self.lanes = lanes
        self.kept = kept  # how many verdicts are believed
        self.start = time.time()
        self.until = self.start + seconds
        self.keys = {b: key(b, lanes.master) for b in bugs}
        self.retried = set()  # tests that were red once
        self.green = {}  # {test: passed, skipped or red}, without a patch
        self.caught, self.alive = [], []
        self.used = 0.0  # seconds of processor time
        self.count()

    def count(self):
        "For the last line of .ci/run; an interrupted run leaves the rest as failed."
        out = ROOT / "build" / "results"
        out.mkdir(parents=True, exist_ok=True)
        tried = len(self.caught) + len(self.alive) or len(self.bugs) - len(self.idle())
        caught = len(self.caught)
        counts = {"passed": 0, "failed": tried - caught, "caught": caught, "total": tried, "kept": self.kept}
        counts["names"] = [f"survived: {bug.name}" for bug in self.alive]
        (out / "mutants.json").write_text(json.dumps(counts), encoding="utf-8")

    def waiting(self):
        "For each test file: its tests without a patch, and then its bugs."
        found = []
        for _, some in groupby(self.bugs, lambda b: file_of(b.test)):
            some = [*some]
            tests = sorted({b.test for b in some} - {t for a in found if not a.bug for t in a.tests})
            if tests:
                found.append(Attempt(tuple(tests), limit=4 * LIMIT))
            found += [self.attempt(b) for b in some]
        return found

    def attempt(self, bug):
        return Attempt((bug.test,), (bug.file, bug.old, bug.new), bug=bug)

    def idle(self):
        return [b for b in self.bugs if self.green.get(b.test) == "skipped"]

    def ready(self, attempt):
        return not attempt.bug or self.green.get(attempt.bug.test) == "passed"

    def all(self):
        waiting = self.waiting()
        while True:
            in_time = time.time() < self.until
            following = next((a for a in waiting if in_time and self.ready(a) and self.lanes.takes(a)), None)
            if following:
                waiting.remove(following)
                self.lanes.begin(following)
            elif self.lanes.running:
                self.take(*self.lanes.end(), waiting)
            else:
                break
        self.red()
        self.second_tries()

    def take(self, attempt, outcome, waiting):
        self.used += outcome.seconds
        if attempt.bug:
            return self.judge(attempt.bug, outcome)
        red = self.see(attempt.tests, outcome)
        again = [t for t in red if t not in self.retried]
        self.retried.update(again)
        self.green |= {t: "red" for t in red if t not in again}
        waiting[:0] = [Attempt((t,)) for t in again]  # once more and alone

    def see(self, tests, outcome):
        "Keep which tests are green or skipped without a patch; the others."
        red = []
        for test in tests:
            names = (test, file_of(test))  # a file that is skipped as a whole
            ends = {
                how for case, how in outcome.cases.items() if case in names or case.startswith(test + "[")
            }
            if not ends or ends & {"failed", "error"}:
                red.append(test)
            else:
                self.green[test] = "passed" if "passed" in ends else "skipped"
        if red:
            print(f"red without a patch: {', '.join(red)}\n{outcome.verdict}\n{outcome.tail}", flush=True)
        return red

    def judge(self, bug, outcome, told=""):
        caught = outcome.verdict == "failed"
        if caught:
            self.caught.append(bug)
        elif bug not in self.alive:
            self.alive.append(bug)
        if caught:
            note(bug, self.keys[bug])
        self.count()
        said = f"{bug.name}  ({bug.test})"
        if caught:
            print(f"{told}caught   {said}  {outcome.seconds:.1f} s", flush=True)
        else:
            print(f"{told}SURVIVED {said}: {outcome.verdict}\n{outcome.tail}", flush=True)

    def red(self):
        "A bug is not caught by a test that fails without it."
        for bug in self.bugs:
            if self.green.get(bug.test) != "red":
                continue
            self.alive.append(bug)
            print(f"NOT TRIED {bug.name}  ({bug.test}): the test is red without a patch", flush=True)
        self.count()

    def second_tries(self):
        """Once more and alone: a bug that needs bad luck, or a cluster that did not come up beside another
        one.
        """
        for bug in [b for b in self.alive if self.green[b.test] == "passed"]:
            self.lanes.begin(self.attempt(bug))
            _, outcome = self.lanes.end()
            self.used += outcome.seconds
            if outcome.verdict == "failed":
                self.alive.remove(bug)
            self.judge(bug, outcome, "second try: ")
        for bug in self.alive:
            note(bug, None)

    def end(self):
        "What came of it; the exit code."
        idle = self.idle()
        tried = len(self.caught) + len(self.alive)
        left = len(self.bugs) - len(idle) - tried
        if idle:
            tests = ", ".join(sorted({b.test for b in idle}))
            print(
                f"!!!! {len(idle)} mutants are left out: their tests are skipped here ({tests})", flush=True
            )
        if left:
            print(f"!!!! {left} of {len(self.bugs)} mutants were not begun in time: `make mutants` runs all")
        each = f", {self.used / tried:.1f} s of processor time each" if tried else ""
        took = f"{time.time() - self.start:.0f} s{each}"
        print(f"{len(self.caught)}/{tried} mutants caught in {took}; {self.kept} more verdicts are kept")
        return int(bool(self.alive) or (left > 0 and not tried))


def asked(argv):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("words", nargs="*")
    ask.add_argument("-j", type=int, default=2)
    for flag in ("--list", "--fit", "--all", "--start"):
        ask.add_argument(flag, action="store_true")
    ask.add_argument("--again", type=float, default=0.0)
    ask.add_argument("--seconds", type=float, default=float("inf"))
    return ask.parse_args(argv)


def without_cluster(bugs):
    "Those that can be tried on this machine."
    why = cluster.missing()
    if not why:
        return bugs
    here = [b for b in bugs if not needs_cluster([b.test])]
    if len(here) < len(bugs):
        left = len(bugs) - len(here)
        print(f"!!!! NO SLURM: {left} mutants of the batch scripts are left out ({why})", flush=True)
    return here


def to_try(bugs, args, commit):
    "The bugs without a kept verdict, and those that are tried again."
    if args.all:
        return bugs
    table = read_table()
    kept = [b for b in bugs if table.get((b.file, b.name)) == key(b)]
    again = random.Random(f"again {commit}").sample(kept, round(len(kept) * args.again))
    believed = {*kept} - {*again}
    return [b for b in bugs if b not in believed]


def recent_files():
    "Those of the last commits, and those that are changed now."
    committed = git("log", "-n", str(RECENT), "--name-only", "--format=")
    return {*committed.splitlines(), *git("diff", "--name-only", "HEAD").splitlines()}


def main(argv=None):
    args = asked(argv)
    chosen = [b for b in BUGS if not args.words or any(w in b.name or w in b.file for w in args.words)]
    if not chosen:
        raise SystemExit(f"no mutant has {' or '.join(args.words)} in its name or file: --list shows all")
    if args.list:
        return print(*(f"{b.file}: {b.name}  ->  {b.test}" for b in chosen), sep="\n")
    if args.fit:
        return told_misfits(chosen)
    chosen = without_cluster(chosen)
    commit = git("rev-parse", "HEAD")
    bugs = in_order(to_try(chosen, args, commit), recent_files(), commit)
    if told_misfits(bugs):
        return 1
    kept = len(chosen) - len(bugs)
    print(f"{len(bugs)} mutants, {args.j} at a time; {kept} more verdicts are kept (see --all)", flush=True)
    why = "asked for" if args.start or not bugs else warm()
    if why and bugs:
        print(f"each test starts a Python: {why}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends too
    with Lanes(args.j, fork=not why) as lanes:
        run = Run(bugs, lanes, args.seconds, kept)
        run.all()
        return run.end()


if __name__ == "__main__":
    raise SystemExit(main())
