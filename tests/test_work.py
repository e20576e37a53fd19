"""Long work in units: a stop is heard within a unit, a refusal is told, the lock goes with the process."""

import os
import signal

import pytest

from sdcourse.core import UserError
from sdcourse.engine.work import JobOptions, LongWork, run_work


class Endless(LongWork):
    "One unit that goes on until it is told to leave; the second one must not begin."

    def __init__(self):
        self.steps, self.begun = 0, []

    def todo(self):
        return ["first", "second"]

    def do(self, unit, go_on):
        self.begun.append(unit)
        while go_on(1) and self.steps < 1000:
            self.steps += 1
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    def left(self):
        return 2

    def report(self, left, stopped):
        self.said = left, stopped


def options(**over):
    return JobOptions(device="cpu", threads=1, **over)


def test_a_stop_is_heard_within_a_unit(tmp_path):
    work = Endless()
    assert run_work(tmp_path, options(requeue_code=75), lambda device: work) == 75
    assert (work.steps, work.begun, work.said) == (3, ["first"], (2, "SIGTERM"))


def test_a_refusal_leaves_the_folder_to_the_next(tmp_path):
    "Its own words come out, and the lock is gone."

    class Refuses(Endless):
        def do(self, unit, go_on):
            raise UserError("a.png: changed")

    with pytest.raises(UserError, match="a.png: changed"):
        run_work(tmp_path, options(), lambda device: Refuses())
    assert run_work(tmp_path, options(requeue_code=75), lambda device: Endless()) == 75
