"""Two processes share the files of a suite: each test runs once, whoever is quicker, and nothing is lost."""

import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
import test as tool  # tools/test.py

HERE = Path(__file__).resolve().parent
FILE = """
import os, time
import pytest
@pytest.fixture(scope="module", autouse=True)
def built():
    note("built")
    yield
    note("gone")
def note(what):
    with open({log!r}, "a") as f: f.write(f"{name} {{what}} {{os.getpid()}}\\n")
@pytest.mark.parametrize("i", range(3))
def test_it(i):
    note(f"test {{i}}")
    time.sleep(0.1)
    assert {good} or i != 1
"""


@pytest.fixture
def suite(tmp_path):
    "Six files of three tests; one test of the third file fails."
    folder, log = tmp_path / "tests", tmp_path / "log"
    folder.mkdir()
    (tmp_path / "claims").mkdir()
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\ntestpaths = ["tests"]\n')
    (folder / "conftest.py").write_text("from share import pytest_addoption, pytest_configure\n")
    for k in range(6):
        text = FILE.format(log=str(log), name=f"file{k}", good=k != 2)
        (folder / f"test_{k}.py").write_text(text)
    return tmp_path


def start(suite, name, **how):
    "As tools/test.py does it: no folder is named, and that of the claims is there."
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={name}.xml"]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    where = dict(cwd=suite, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([*command, *tool.share(suite / "claims", **how)], **where)


def counts(suite, name):
    found = xml.parse(suite / f"{name}.xml").getroot().find("testsuite")
    return int(found.get("tests")), int(found.get("failures"))


def test_each_test_runs_once_and_is_reported_once(suite):
    both = [start(suite, "a"), start(suite, "b", backwards=True)]
    codes = [p.wait(120) for p in both]
    lines = [line.split() for line in (suite / "log").read_text().splitlines()]
    ran = [(name, i) for name, what, i, *_ in lines if what == "test"]
    assert sorted(ran) == [(f"file{k}", str(i)) for k in range(6) for i in range(3)]
    assert sum(line[1] == "built" for line in lines) == sum(line[1] == "gone" for line in lines) == 6
    assert len({(line[0], line[-1]) for line in lines}) == 6  # a file stays with one process
    (a, bad), (b, worse) = counts(suite, "a"), counts(suite, "b")
    assert (a + b, bad + worse) == (18, 1) and sorted(codes) == [0, 1]


def test_backwards_begins_at_the_end_and_one_alone_does_all(suite):
    assert start(suite, "a", backwards=True).wait(120) == 1
    names = [line.split()[0] for line in (suite / "log").read_text().splitlines()]
    assert [*dict.fromkeys(names)] == [f"file{k}" for k in reversed(range(6))]
    assert counts(suite, "a") == (18, 1)
    assert start(suite, "b").wait(120) == 0 and counts(suite, "b") == (0, 0)
