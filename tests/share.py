"""Two pytest processes go through one suite from its two ends: `--share FOLDER`, one of them `--backwards`.

A file of tests goes as a whole to the process that claims it first, so that what a file builds is built once.
A claim is an empty file in FOLDER. What the other process has claimed is passed over without a report; so
each test is reported by one of them, and the reports of both are the report of the suite.
"""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--share", metavar="FOLDER", help="of claims: another process runs the rest of the files"
    )
    parser.addoption("--backwards", action="store_true", help="with --share: begin with the last file")


def pytest_configure(config):
    if folder := config.getoption("share"):
        config.pluginmanager.register(Shared(Path(folder), config.getoption("backwards")))


class Shared:
    "Claims files of tests as their turn comes."

    def __init__(self, folder, backwards):
        self.folder, self.backwards = folder, backwards
        self.mine = {}  # file: whether it is this process's

    def claims(self, path):
        if path not in self.mine:
            try:
                (self.folder / path.name).touch(exist_ok=False)
                self.mine[path] = True
            except FileExistsError:
                self.mine[path] = False
        return self.mine[path]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        files = [*dict.fromkeys(item.path for item in items)]
        if self.backwards:
            items.sort(key=lambda item: -files.index(item.path))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        return None if self.claims(item.path) else True
