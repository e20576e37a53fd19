"""The machinery behind `check.exN`: it never raises, and what it says is right."""

import numpy as np
import pytest
import torch

from sdcourse.check import Verdict, brief, compare, same

CASES = [(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 7.0])), (torch.zeros(2, 2), torch.ones(2, 2))]


def right(x0, eps):
    return eps - x0


def backwards(x0, eps):
    return x0 - eps


def halved(x0, eps):
    return (eps - x0) / 2


HINTS = [(backwards, "turn the arrow round"), (halved, "where does the half come from?")]


def ask(fn, **kwargs):
    return compare("ex1", fn, CASES, right, **{"hints": HINTS} | kwargs)


def test_right_answers_are_right():
    assert ask(right).ok and ask(lambda x0, eps: -(x0 - eps)).ok and bool(ask(right))
    assert (
        ask(lambda x0, eps: eps - x0 + 1e-8).ok
        and not ask(lambda x0, eps: eps - x0 + 1e-4).ok
        and ask(lambda x0, eps: eps - x0 + 1e-4, tol=1e-3).ok
    )
    assert ask(lambda x0, eps: (eps - x0).numpy()).ok


def test_wrong_values_are_wrong():
    verdict = ask(lambda x0, eps: eps + x0)
    assert (
        not verdict.ok
        and "yours    [6 9]" in verdict.text
        and "expected [4 5]" in verdict.text
        and "input    ([1 2], [5 7])" in verdict.text
        and "Hint" not in verdict.text
    )
    only_later = ask(lambda x0, eps: eps - x0 if x0.ndim == 1 else eps + 2)
    assert not only_later.ok and "of shape [2, 2]" in only_later.text


def test_hints_go_to_their_own_mistake():
    assert ask(backwards).text.endswith("Hint: turn the arrow round")
    assert ask(halved).text.endswith("Hint: where does the half come from?")


def test_shapes_must_agree():
    verdict = ask(lambda x0, eps: (eps - x0)[:1])
    assert not verdict.ok and "The shape is [1] and should be [2]." in verdict.text
    assert (
        not same(torch.ones(1), torch.ones(3))
        and not same(1.0, torch.ones(1))
        and not same(np.zeros(0), np.zeros((0, 1)))
    )


@pytest.mark.parametrize(
    "fn, word",
    [
        (lambda a, b: a[9], "IndexError"),
        (lambda a: a, "TypeError"),
        (lambda a, b: exit(1), "SystemExit"),
        (lambda a, b: None, "`return` missing"),
        (lambda a, b: "text", "expected [4 5]"),
        (lambda a, b: [a, b], "expected [4 5]"),
        (lambda a, b: object(), "yours    object"),
        (7, "the function itself"),
        (None, "the function itself"),
    ],
)
def test_a_check_never_raises(fn, word):
    verdict = ask(fn)
    assert not verdict.ok and word in verdict.text and repr(verdict).startswith("✗ ex1")


def test_stubs_are_not_done_yet():
    def stub(x0, eps):
        raise NotImplementedError

    assert not ask(stub).ok and "not done yet" in ask(stub).text


def test_inputs_and_random_state_are_kept():
    def rude(x0, eps):
        out = eps - x0
        x0.zero_()
        torch.randn(3)
        np.random.rand(3)
        return out

    before, torch_state, np_state = (
        CASES[0][0].clone(),
        torch.random.get_rng_state(),
        np.random.get_state()[1].copy(),
    )
    assert ask(rude).ok
    assert (
        torch.equal(CASES[0][0], before)
        and torch.equal(torch.random.get_rng_state(), torch_state)
        and (np.random.get_state()[1] == np_state).all()
    )
    assert compare("draw", lambda n: torch.randn(n), [3, {"n": 2}], lambda n: torch.randn(n)).ok


def test_structures_and_markdown():
    assert (
        same({"a": [1, (2.0,)]}, {"a": (1, [2.0])})
        and same(float("nan"), np.float32("nan"))
        and same("x", "x")
        and same(None, None)
    )
    assert (
        not same({"a": 1}, {"a": 1, "b": 2})
        and not same([1], [1, 2])
        and not same("x", None)
        and not same(True, "x")
    )
    assert same(torch.tensor(1.0, dtype=torch.bfloat16), 1.0)
    assert (
        brief({"t": torch.tensor(0.5)}) == "{t: 0.5}"
        and brief(torch.zeros(0)) == "empty [0]"
        and brief(torch.arange(9.0)) == "[9] mean 4 std 2.58"
    )
    assert Verdict(True, "a\nb")._repr_markdown_() == "**✓ a**\n- b"
