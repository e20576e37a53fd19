"The small worlds: which digits are held out, and that every row keeps its id."

import numpy as np
import pytest
import torch

from sdcourse.core import UserError
from sdcourse.data.items import Items
from sdcourse.data.sets.digits import digits


@pytest.fixture(scope="module")
def source():
    from sklearn.datasets import load_digits

    return load_digits()


def test_every_fifth_digit_is_held_out():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert test.tensors["id"].tolist() == list(range(0, 1797, 5))
    assert sorted(train.tensors["id"].tolist() + test.tensors["id"].tolist()) == list(range(1797))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_is_the_digit_with_that_id(source, split):
    data = digits(split)
    ids = data.tensors["id"].numpy()
    assert np.array_equal(data.tensors["label"].numpy(), source.target[ids])
    assert np.array_equal((data.tensors["pixels"][:, 0].double().numpy() + 1) * 8, source.images[ids])


def test_pixels_are_float32_in_minus_one_to_one():
    pixels = digits("train").tensors["pixels"]
    assert pixels.dtype == torch.float32 and pixels.shape[1:] == (1, 8, 8)
    assert pixels.min() == -1 and pixels.max() == 1


def test_no_held_out_picture_is_a_training_picture():
    seen = {p.numpy().tobytes() for p in digits("train").tensors["pixels"]}
    assert not any(p.numpy().tobytes() in seen for p in digits("test").tensors["pixels"])


def test_a_batch_is_its_rows():
    data, rows = digits("train"), [5, 0, 1436, 5]
    batch = data.__getitems__(rows)
    for n, i in enumerate(rows):
        item = data[i]
        assert (batch["id"][n], batch["label"][n]) == (item["id"], item["label"])
        assert torch.equal(batch["pixels"][n], item["pixels"])
    assert type(data[3]["id"]) is int and type(data[3]["label"]) is int


def test_a_loader_needs_no_gluing():
    loader = torch.utils.data.DataLoader(digits("test"), batch_size=100, collate_fn=lambda b: b)
    assert torch.cat([b["id"] for b in loader]).tolist() == list(range(0, 1797, 5))


def test_fingerprint_sees_values_names_types_and_shapes():
    base = dict(id=torch.arange(4), x=torch.zeros(4, 2))
    prints = {
        Items(t).fingerprint()
        for t in (
            base,
            {**base, "x": torch.ones(4, 2)},
            {**base, "x": torch.zeros(4, 1, 2)},
            {**base, "x": torch.zeros(4, 2, dtype=torch.int32)},
            {"id": base["id"], "y": base["x"]},
        )
    }
    assert len(prints) == 5
    assert Items(base).fingerprint() == Items(dict(reversed(base.items()))).fingerprint()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: digits("tset"), "did you mean 'test'?"),
        (lambda: Items(dict(x=torch.zeros(3))), "'id'"),
        (lambda: Items(dict(id=torch.arange(3), x=torch.zeros(2))), "one length"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call, words):
    with pytest.raises(UserError) as e:
        call()
    assert words in str(e.value) and "\n" not in str(e.value)
