"The judge of digits: its yardsticks against closed forms and oracles, its own accuracy, and that it disturbs nobody."
import pytest
import torch

from sdcourse.core import UserError
from sdcourse.data.worlds import digits
from sdcourse.evaluation import digits as ev


@pytest.fixture(scope="module")
def judge(): return ev.the_judge()


def balanced(n=500):
    data = digits("train")
    rows = torch.cat([(data.tensors["label"] == k).nonzero().flatten()[: n // 10] for k in range(10)])
    batch = data.__getitems__(rows)
    return batch["pixels"], batch["label"]


# ---- shares

def test_wilson_against_scipy():
    from scipy.stats import binomtest
    for hits, n in ((0, 5), (8, 10), (495, 500), (500, 500)):
        want, got = binomtest(hits, n).proportion_ci(method="wilson"), ev.wilson(hits, n)
        assert (got["value"], got["n"]) == (hits / n, n)
        assert (got["low"], got["high"]) == pytest.approx((want.low, want.high), abs=1e-6)


# ---- the judge

def test_judge_knows_held_out_digits(judge):
    assert judge.own["n"] == 360 and judge.own["value"] >= 0.985
    assert judge.own["low"] < judge.own["value"] < judge.own["high"]


def test_judge_never_sees_held_out_digits(monkeypatch):
    data = digits("test")
    poisoned = type(data)({**data.tensors, "pixels": torch.full_like(data.tensors["pixels"], float("nan"))})
    clean = ev.Judge(steps=5)
    monkeypatch.setattr(ev, "digits", lambda split: poisoned if split == "test" else digits(split))
    other = ev.Judge(steps=5)
    assert all(torch.equal(p, q) for p, q in zip(clean.body.parameters(), other.body.parameters()))
    assert clean.scale == other.scale


def test_judge_is_deterministic_and_leaves_the_global_random_state_alone():
    torch.manual_seed(1); before, first = torch.get_rng_state(), ev.Judge(steps=20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2); second = ev.Judge(steps=20)
    assert all(torch.equal(p, q) for p, q in zip(first.body.parameters(), second.body.parameters()))
    x = digits("test").tensors["pixels"]
    assert torch.equal(first(x)[1], second(x)[1])
    other = ev.Judge(1, steps=20)
    assert not torch.equal(first(x)[1], other(x)[1])


def test_judge_is_the_same_on_one_and_two_threads_and_puts_the_number_back():
    judges = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        judges.append(ev.Judge(steps=10))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(p, q) for p, q in zip(judges[0].body.parameters(), judges[1].body.parameters()))
    assert judges[0].scale == judges[1].scale


def test_judging_leaves_the_global_random_state_alone(judge):
    before = torch.get_rng_state()
    ev.report(judge, *balanced())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_judge_can_be_made_without_gradients():
    with torch.no_grad(): a = ev.Judge(steps=3)
    assert all(torch.equal(p, q) for p, q in zip(a.body.parameters(), ev.Judge(steps=3).body.parameters()))


def test_features_are_scaled_to_a_variance_of_100(judge):
    features = judge(judge.train.tensors["pixels"])[1]
    assert features.shape == (1437, ev.FEATURES)
    assert features.var(0).sum().item() == pytest.approx(100, rel=1e-3)


# ---- numbers

def test_distance_compares_equal_counts_of_equal_classes(judge):
    images, asked = balanced()
    d = judge.distance(images, asked)
    assert d["n"] == 360 and d["floor"] <= d["floor_high"]
    twos = asked == 2 # 26 of them are held out
    assert judge.distance(images[twos], asked[twos])["n"] == 26


def test_class_matching_ignores_classes_that_one_side_lacks():
    rows, real = ev._same_classes(torch.tensor([3, 3, 3, 1]), torch.tensor([0, 3, 1, 3, 1]))
    assert rows.tolist() == [3, 0, 1] and real.tolist() == [2, 1, 3]


def test_training_digits_are_at_the_floor_and_noise_is_not(judge):
    images, asked = balanced()
    d = judge.distance(images, asked)
    assert 0.3 * d["floor"] < d["value"] < 2 * d["floor"]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    assert judge.distance(noise, asked)["value"] > 20 * d["floor"]


def test_floor_is_real_against_real(judge):
    "The floor must not come from the reference itself, nor from copies of it."
    images, asked = balanced()
    held = judge.held_out.tensors
    own = judge.distance(held["pixels"], held["label"])
    assert own["value"] < 1e-6 and own["floor"] > 0.5


def test_neighbours_finds_copies_exactly():
    train, rows = digits("train").tensors["pixels"] * 0.7310586, [3, 1000, 7] # no round numbers
    index, distance = ev.neighbours(train[rows], train)
    assert index.tolist() == rows and distance.tolist() == [0, 0, 0]
    moved = train[rows].clone(); moved[:, 0, 0, 0] += 0.5
    assert ev.neighbours(moved, train)[1].tolist() == pytest.approx([0.5] * 3, abs=1e-6)


def test_memorisation_yardstick():
    real, train = (digits(split).tensors["pixels"] for split in ("test", "train"))
    same, copy = ev.memorisation(real, real, train), ev.memorisation(train[:300], real, train)
    assert same["closer"] == pytest.approx(0.5) and same["copies"] == pytest.approx(0.05, abs=0.01)
    assert (copy["closer"], copy["copies"], copy["distance"]) == (1, 1, 0)
    far = ev.memorisation(torch.zeros_like(real), real, train)
    assert (far["closer"], far["copies"]) == (0, 0)


def test_accuracy_counts_the_asked_class(judge):
    real = judge.held_out.tensors
    assert judge.accuracy(real["pixels"], (real["label"] + 1) % 10)["value"] < 0.02
    assert judge.accuracy(real["pixels"], real["label"].tolist()) == judge.own


def test_summary_names_every_number_with_its_n(judge):
    text = ev.summary(ev.report(judge, *balanced()))
    assert "FD[digits-judge]" in text and "FID" not in text
    assert "N=500" in text and "N=360" in text and "real against real" in text and len(text.splitlines()) == 6


def test_copies_and_ten_digits_repeated_differ_where_they_should(judge):
    "KID and recall see ten digits repeated, and take copies for real ones; few digits have no such numbers."
    real = judge.held_out.tensors
    ten = torch.stack([(real["label"] == k).nonzero()[0, 0] for k in range(10)]).repeat(36)
    same, few = ev.report(judge, *balanced()), ev.report(judge, real["pixels"][ten], real["label"][ten])
    assert few["shares[digits-judge]"]["recall"] < 0.02 and few["shares[digits-judge]"]["precision"] > 0.95 and same["shares[digits-judge]"]["recall"] > 0.8
    k = [x["KID[digits-judge]"] for x in (same, few)]
    assert k[0]["value"] < 3 * k[0]["se"] and k[1]["value"] > 5 * k[1]["se"] and k[0]["n"] == 360
    assert "KID[digits-judge]" not in ev.report(judge, real["pixels"][:5], real["label"][:5])


@pytest.mark.parametrize("call", [
    lambda j: j(torch.zeros(2, 8, 8)), lambda j: j(torch.zeros(2, 3, 8, 8)), lambda j: j(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)),
    lambda j: j.accuracy(torch.zeros(2, 1, 8, 8), [1]), lambda j: ev.wilson(3, 2), lambda j: ev.wilson(0, 0),
])
def test_wrong_input_is_refused_in_one_line(judge, call):
    with pytest.raises(UserError) as e: call(judge)
    assert "\n" not in str(e.value)
