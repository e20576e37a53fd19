"Nearest training pictures: copies are found exactly, and the yardstick is what new real pictures get."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcourse.data.sets.digits import digits
from sdcourse.evaluation.memorise import memorisation, nearer_than, neighbours


def test_neighbours_finds_copies_exactly():
    train, rows = digits("train").tensors["pixels"] * 0.7310586, [3, 1000, 7]  # no round numbers
    index, distance = neighbours(train[rows], train)
    assert index.tolist() == rows and distance.tolist() == [0, 0, 0]
    moved = train[rows].clone()
    moved[:, 0, 0, 0] += 0.5
    assert neighbours(moved, train)[1].tolist() == pytest.approx([0.5] * 3, abs=1e-6)


FEW = st.lists(st.integers(0, 5), min_size=1, max_size=9)


@settings(max_examples=60)
@given(FEW, FEW)
def test_shares_without_a_table_are_those_of_all_pairs(ours, real):
    a, b = (torch.tensor(x, dtype=torch.float32) for x in (ours, real))
    farther, equal = nearer_than(a, b)
    assert farther.tolist() == pytest.approx((a[:, None] < b).double().mean(1).tolist())
    assert equal.tolist() == pytest.approx((a[:, None] == b).double().mean(1).tolist())


def test_memorisation_yardstick():
    real, train = (digits(split).tensors["pixels"] for split in ("test", "train"))
    same, copy = memorisation(real, real, train), memorisation(train[:300], real, train)
    assert same["closer"] == pytest.approx(0.5) and same["copies"] == pytest.approx(0.05, abs=0.01)
    assert (copy["closer"], copy["copies"], copy["distance"]) == (1, 1, 0)
    far = memorisation(torch.zeros_like(real), real, train)
    assert (far["closer"], far["copies"]) == (0, 0)
