"Nearest training pictures: copies are found exactly, and the yardstick is what new real pictures get."

import pytest
import torch

from sdcourse.data.sets.digits import digits
from sdcourse.evaluation.memorise import memorisation, neighbours


def test_neighbours_finds_copies_exactly():
    train, rows = digits("train").tensors["pixels"] * 0.7310586, [3, 1000, 7]  # no round numbers
    index, distance = neighbours(train[rows], train)
    assert index.tolist() == rows and distance.tolist() == [0, 0, 0]
    moved = train[rows].clone()
    moved[:, 0, 0, 0] += 0.5
    assert neighbours(moved, train)[1].tolist() == pytest.approx([0.5] * 3, abs=1e-6)


def test_memorisation_yardstick():
    real, train = (digits(split).tensors["pixels"] for split in ("test", "train"))
    same, copy = memorisation(real, real, train), memorisation(train[:300], real, train)
    assert same["closer"] == pytest.approx(0.5) and same["copies"] == pytest.approx(0.05, abs=0.01)
    assert (copy["closer"], copy["copies"], copy["distance"]) == (1, 1, 0)
    far = memorisation(torch.zeros_like(real), real, train)
    assert (far["closer"], far["copies"]) == (0, 0)
