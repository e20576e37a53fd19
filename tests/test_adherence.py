"""What a judge says of drawn emoji: each number has a case that is right and one that is not."""

import pytest

from sdcourse.evaluation.adherence import CROWD, FACTS_OF_PEOPLE, EmojiJudge, emoji_adherence


@pytest.fixture(scope="module")
def judge():
    return EmojiJudge()


@pytest.fixture(autouse=True)
def one_judge(judge, monkeypatch):
    monkeypatch.setattr("sdcourse.evaluation.adherence.EmojiJudge", lambda: judge)


def test_relatives_differ_in_one_fact(judge):
    for fact in FACTS_OF_PEOPLE:
        asked = judge.held_out(30, fact)
        assert len(set(asked)) == 30 and min(asked) >= judge.known
        for number in asked:
            some = judge.relatives(number, fact)
            values = [judge.rows[i]["facts"][fact] for i in some]
            assert number in some and len(set(values)) == len(values) > 1
            rest = [{k: v for k, v in judge.rows[i]["facts"].items() if k != fact} for i in some]
            assert rest.count(rest[0]) == len(rest)
    assert judge.relatives(0, "tone") == []  # a medal


def test_strangers_hold_the_asked_one_once(judge):
    for number in (0, 7, len(judge.rows) - 1):
        some = judge.strangers(number)
        assert len(set(some)) == len(some) == CROWD and some[0] == number
        assert some == judge.strangers(number) != judge.strangers(1)


def test_real_pictures_are_right_and_those_of_others_wrong():
    right = emoji_adherence(lambda numbers, judge: [judge.images[i] for i in numbers], 40)
    assert set(right) == {"concept", *(f"{fact}_held_out" for fact in FACTS_OF_PEOPLE)}
    assert all(found["value"] == 1 and found["n"] == 40 for found in right.values())
    assert right["concept"]["chance"] == pytest.approx(0.01)
    assert right["gender_held_out"]["chance"] == pytest.approx(0.45, abs=0.06)

    def others(numbers, judge):
        return [judge.images[(i + 1400) % len(judge.rows)] for i in numbers]  # neighbours look alike

    wrong = emoji_adherence(others, 40)
    assert wrong["concept"]["value"] < 0.1 and wrong["role_held_out"]["value"] < 0.2
