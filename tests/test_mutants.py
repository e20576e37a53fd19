"""Planted bugs: caught means that a test failed, nothing outlives a bug, kept verdicts fall with what they
depend on.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import attempt
import mutants

PARTS = {
    "sdcourse/__init__.py": "x = 1\n",
    "tests/conftest.py": "import helper\n",
    "tests/helper.py": "y = 1\n",
    "tests/other.py": "z = 1\n",
    "tests/tool.py": "",
    "tests/test_y.py": "import sdcourse.nothing\ndef test_it(): pass\n",
    "tests/test_x.py": """
import os, pytest, subprocess, sys, time
import sdcourse, helper

def test_good(): assert sdcourse.x == 1
def test_bad(): assert sdcourse.x == 2
def test_raises(): sdcourse.y
@pytest.fixture
def broken(): 1 / 0
def test_setup(broken): pass
@pytest.fixture
def breaks(): yield; 1 / 0
def test_teardown(breaks): assert False
def test_skipped(): pytest.skip('no')
def test_exits(): os._exit(1)
def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)
    time.sleep(99)
def test_writes(): open("tests/helper.py", "a").write("y = 2")
def test_loose(): assert sdcourse.x
TOOL = "tests/tool.py"
""",
}
TESTS = ("good", "bad", "raises", "setup", "teardown", "skipped", "exits", "hangs", "writes", "absent")
JUDGED = """
import json, os, sys
import attempt
root, fork = attempt.Path(sys.argv[1]), sys.argv[2] == "fork"
if fork: attempt.warm()
attempt.adopt()
found = {}
def end():
    tried, outcome = lanes.end()
    found[tried.tests[0]] = outcome.verdict
with attempt.Lanes(2, fork, root) as lanes:
    for test in sys.argv[3:]:
        if len(lanes.running) == 2: end()
        lanes.begin(attempt.Attempt((test,), limit=3 if "hangs" in test else 30))
    while lanes.running: end()
    left = attempt.children()
    for pid in left: os.kill(pid, 9)
    mended = (lanes.master / "tests/helper.py").read_text()
    lanes.begin(attempt.Attempt(("tests/test_x.py::test_good",), ("sdcourse/__init__.py", "x = 1", "x = 2")))
    copy = [work / "copy" for _, work in lanes.running.values()][0]
    links = [(copy / name).stat().st_nlink for name in ("tests/helper.py", "sdcourse/__init__.py")]
    planted = lanes.end()[1].verdict
    stranger = None
    if fork:
        sys.path.insert(0, str(root))
        import sdcourse
        lanes.begin(attempt.Attempt(("tests/test_x.py::test_good",)))
        stranger = lanes.end()[1].verdict
said = dict(found=found, left=left, mended=mended, planted=planted, links=links, stranger=stranger)
print(json.dumps(said | dict(gone=not lanes.folder.exists())))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A checkout of a few lines."
    root = tmp_path_factory.mktemp("tiny")
    for name, text in PARTS.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def in_python(code, *words):
    "Run code in a process that has imported little; what it prints last."
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    argv = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def judged(tiny):
    tests = [f"tests/test_x.py::test_{t}" for t in TESTS]
    return in_python(JUDGED, tiny, "fork", *tests, "tests/test_y.py::test_it")


def test_caught_means_that_the_test_failed(judged):
    verdicts = {test.split("test_")[-1]: verdict for test, verdict in judged["found"].items()}
    assert (verdicts.pop("good"), verdicts.pop("writes")) == ("passed", "passed")
    assert (verdicts.pop("bad"), verdicts.pop("raises")) == ("failed", "failed")
    assert len(verdicts) == 7 and not {"passed", "failed"} & {*verdicts.values()}, verdicts
    assert verdicts["hangs"] == "no end within 3 s"
    assert judged["planted"] == "failed"


def test_a_started_python_judges_as_a_forked_one(tiny, judged):
    tests = ["tests/test_x.py::test_raises"]
    started = in_python(JUDGED, tiny, "start", *tests)
    assert started["found"] == {t: judged["found"][t] for t in tests}
    assert started["planted"] == "failed"


def test_only_the_copy_is_tested(judged):
    assert judged["stranger"] == "the copy is not what is imported"


def test_nothing_outlives_a_bug(judged):
    assert judged["left"] == [] and judged["gone"]


def test_a_hard_link_changes_no_original(tiny, judged):
    assert (tiny / "tests/helper.py").read_text() == PARTS["tests/helper.py"] == judged["mended"]
    assert judged["links"] == [2, 1]
    assert (tiny / "sdcourse/__init__.py").read_text() == "x = 1\n"


# ---- rows and their kept verdicts
def test_patches_fit_exactly_once():
    assert attempt.patched("a = 1\n", "1", "2", "x.py") == "a = 2\n"
    for text, old, new in (("a = 1\n", "3", "2"), ("a = 1\nb = 1\n", "1", "2")):
        with pytest.raises(SystemExit, match="must occur once"):
            attempt.patched(text, old, new, "x.py")
    with pytest.raises(SyntaxError):
        attempt.patched("a = 1\n", "1", "(", "x.py")
    texts = {b.file: (mutants.ROOT / b.file).read_text(encoding="utf-8") for b in mutants.BUGS}
    assert not [b for b in mutants.BUGS if texts[b.file].count(b.old) != 1]
    assert len({b.name for b in mutants.BUGS}) == len(mutants.BUGS)


def bug(name, new, test):
    return mutants.Bug(name, "sdcourse/__init__.py", "x = 1", new, f"tests/test_x.py::test_{test}")


BUGS = [
    bug("two", "x = 2", "good"),
    bug("three", "x = 3", "loose"),
    bug("four", "x = 4", "skipped"),
    bug("five", "x = 5", "raises"),
]  # caught, survives, is not tried, has a test that is red anyway
COUNTS = ("sdcourse/__init__.py", "tests/test_x.py", "tests/helper.py", "tests/tool.py", "tests/conftest.py")


def test_a_key_falls_with_what_the_verdict_depends_on(tiny):
    def keys():
        mutants.digest.cache_clear()
        mutants.used_by.cache_clear()
        return mutants.key(BUGS[0], tiny)

    first = keys()
    for name in PARTS:
        (tiny / name).write_text(PARTS[name] + "# more\n")
        assert (keys() != first) == (name in COUNTS), name
        (tiny / name).write_text(PARTS[name])
        assert keys() == first
    assert len({mutants.key(b._replace(name="same"), tiny) for b in BUGS}) == len(BUGS)


RUN = f"""
import json, sys
import attempt
import mutants
mutants.ROOT = attempt.Path(sys.argv[1])
mutants.TABLE = mutants.ROOT / "verdicts.txt"
mutants.BUGS = [mutants.Bug(*row) for row in {[tuple(b) for b in BUGS]}]
mutants.note(mutants.BUGS[1], "0123456789abcdef")
attempt.warm()
with mutants.Lanes(2, True, mutants.ROOT) as lanes:
    run = mutants.Run(mutants.BUGS, lanes, 99, 5)
    run.all()
    code = run.end()
counts = json.loads((mutants.ROOT / "build/results/mutants.json").read_text())
key = mutants.key(mutants.BUGS[0], mutants.ROOT)
alive = [b.name for b in run.alive]
print(json.dumps(dict(code=code, counts=counts, table=mutants.TABLE.read_text(), key=key, alive=alive)))
"""


def test_what_survives_is_said_and_struck_off(tiny, monkeypatch):
    monkeypatch.setenv("CI", "")
    found = in_python(RUN, tiny)
    assert found["code"] == 1 and {*found["alive"]} == {"three", "five"}
    assert found["table"] == f"{found['key']} sdcourse/__init__.py: two\n"
    counts = {"passed": 0, "failed": 2, "caught": 1, "total": 3, "kept": 5}
    assert found["counts"] == counts | {"names": ["survived: three", "survived: five"]}


def test_nothing_is_written_in_ci(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "TABLE", tmp_path / "verdicts.txt")
    monkeypatch.setenv("CI", "true")
    mutants.note(mutants.BUGS[0], "0123456789abcdef")
    assert not mutants.TABLE.exists()
    monkeypatch.setenv("CI", "")
    mutants.note(mutants.BUGS[0], "0123456789abcdef")
    assert mutants.read_table() == {(mutants.BUGS[0].file, mutants.BUGS[0].name): "0123456789abcdef"}


def test_kept_ones_are_tried_again_at_random(monkeypatch):
    table = {(b.file, b.name): mutants.key(b) for b in mutants.BUGS[:100]}
    monkeypatch.setattr(mutants, "read_table", lambda: table)
    asked = mutants.asked(["--again", "0.1"])
    tried = {commit: mutants.to_try(mutants.BUGS, asked, commit) for commit in "ab"}
    assert mutants.to_try(mutants.BUGS, mutants.asked([]), "a") == mutants.BUGS[100:]
    assert [len(t) for t in tried.values()] == [len(mutants.BUGS) - 90] * 2 and tried["a"] != tried["b"]
    assert mutants.to_try(mutants.BUGS, mutants.asked(["--all"]), "a") == mutants.BUGS


def test_changed_files_come_first():
    some = mutants.BUGS[::7]
    recent = {some[-1].file}
    order = mutants.in_order(some, recent, "a")
    changed = [b.file in recent for b in order]
    assert changed == sorted(changed, reverse=True) and any(changed) and {*order} == {*some}
    assert order == mutants.in_order(some, recent, "a") != mutants.in_order(some, recent, "b")


def test_no_group_of_rows_hides_another():
    "Of two groups under one key Python keeps the last."
    tree = ast.parse((Path(__file__).parent / "planted.py").read_text(encoding="utf-8"))
    [table] = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    keys = [ast.literal_eval(key) for key in table.keys]
    assert len({*keys}) == len(keys)
