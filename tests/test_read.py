"""What a caption says: sentences that were written by hand, each with what a person reads in it, and none
of them made by the package; then what is made of them, and the report.
"""

import json

import pytest

from sdcourse import cli
from sdcourse.caption.facts import ATTRIBUTES, Facts
from sdcourse.caption.read import degenerate, judge_caption, read_face, read_scene
from sdcourse.caption.report import ReportOptions, report_captions
from sdcourse.caption.table import read_captions

FACES = """
A man in a dark suit and a red tie smiles at the camera. | Male Wearing_Necktie Smiling
The woman isn't smiling. | -Male -Smiling
She has long, wavy brown hair and wears gold earrings. | -Male Wavy_Hair Brown_Hair Wearing_Earrings
He has no beard, but a thin mustache. | Male No_Beard Mustache
A bearded man without glasses | Male -No_Beard -Eyeglasses
a bald man with a goatee and sunglasses | Male Bald Goatee Eyeglasses
This is a blurry photo of a blonde woman. | Blurry -Male Blond_Hair
a gray-haired man whose mouth is closed | Gray_Hair Male -Mouth_Slightly_Open
A lady in heavy make-up with red lipstick and rosy cheeks | -Male Heavy_Makeup Wearing_Lipstick Rosy_Cheeks
the boy wears a baseball cap and never a necktie | Male Wearing_Hat -Wearing_Necktie
A clean-shaven man of forty | Male No_Beard -5_o_Clock_Shadow -Goatee -Mustache
a woman with bangs, arched eyebrows and high cheekbones | -Male Bangs Arched_Eyebrows High_Cheekbones
Her hair is black and straight. | -Male Black_Hair
an elderly man, laughing with his mouth open | -Young Male Smiling Mouth_Slightly_Open
A young woman wearing neither a hat nor glasses. | Young -Male -Wearing_Hat -Eyeglasses
A portrait of a person with straight black hair, not blurred | Straight_Hair Black_Hair -Blurry
a man with five o'clock shadow, bushy eyebrows and sideburns | Male 5_o_Clock_Shadow Bushy_Eyebrows Sideburns
A woman with curly hair and a necklace stands in a garden | -Male Wavy_Hair Wearing_Necklace
the smiling girl lacks earrings, and her face is oval | Smiling -Male -Wearing_Earrings
a serious guy with an oval face | -Smiling Male Oval_Face
""".strip().splitlines()


@pytest.mark.parametrize("line", FACES)
def test_a_person_reads_the_same_in_a_sentence(line):
    text, _, wanted = line.partition(" | ")
    expected = {w.lstrip("-"): {not w.startswith("-")} for w in wanted.split()}
    assert read_face(text)[0] == expected


def face(*there):
    return Facts("faces", {n: n in there for n in ATTRIBUTES})


def test_facts_are_kept_lost_contradicted_and_invented():
    known = face("Male", "Smiling", "Eyeglasses", "Black_Hair", "Goatee", "Attractive")
    found = judge_caption("A woman with glasses and a beard, and without a goatee, in a hat", known)
    assert set(found.kept) == {"Eyeglasses", "No_Beard"}
    assert set(found.lost) == {"Smiling", "Black_Hair"}
    assert set(found.contradicted) == {"Male", "Goatee"} and found.invented == ["Wearing_Hat"]
    assert judge_caption("a handsome man", known).right == 1  # true, and nobody asked
    both = judge_caption("a man who is a woman", known)
    assert both.contradicted == ["Male"] and found.statements == 5


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("A big ring", [dict(shape="ring")]),
        (
            "the small green heart sits in the bottom right",
            [dict(shape="heart", colour="green", size="small", place="bottom right")],
        ),
        ("There is no star, only a teal moon.", [dict(shape="moon", colour="teal")]),
        (
            "a red circle above a large blue square",
            [dict(shape="circle", colour="red"), dict(shape="square", colour="blue", size="large")],
        ),
        (
            "large pink star, top, small teal ring, bottom left, night background",
            [
                dict(shape="star", colour="pink", size="large"),
                dict(shape="ring", colour="teal", size="small"),
            ],
        ),
    ],
)
def test_objects_of_a_scene(text, wanted):
    found = read_scene(text)[0]["objects"]
    if "background" in text:  # places stand between commas
        assert [f.pop("place") for f in found] == ["top", "bottom left"]
    assert found == wanted


def test_a_scene_is_judged_by_its_best_assignment():
    thing = dict(shape="star", colour="red", size="small", place="top")
    other = dict(shape="ring", colour="blue", size="large", place="bottom")
    facts = Facts("scenes", dict(objects=[thing, other], background="mint"))
    found = judge_caption("on a grey background a large blue ring and a small green star in the top", facts)
    assert found.lost == [(1, "place")] and sorted(map(str, found.contradicted)) == [
        "(0, 'colour')",
        "background",
    ]
    assert len(found.kept) == 6 and not found.invented
    assert judge_caption("a red star, a blue ring and a pink moon", facts).invented == ["pink moon"]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a red house with a green door", []),
        ("", ["empty"]),
        ("...", ["empty"]),
        ("a cat on a mat on a mat on a mat", ["repeated"]),
        ("very very nice", []),
        ("As an AI, I see a cat", ["refused"]),
        ("first\nsecond", ["several lines"]),
        ("a woman with a", ["cut off"]),
        ("long " + "word and words " * 40 + "end", ["too long", "repeated"]),
    ],
)
def test_text_that_is_no_caption(text, wanted):
    assert degenerate(text) == wanted


def test_the_report_counts_what_a_person_counts(tmp_path, capsys):
    "Three captions of a world whose facts are known; recall, contradictions and inventions by hand."
    from sdcourse.dataset import pictures

    data = pictures("scenes", "val")
    one = next(i for i in range(50) if data.row(i)["facts"]["count"] == 1)
    table = read_captions(tmp_path, "val")
    good = data.row(one)["texts"][2]
    for k, (id, text) in enumerate(((data.ids[one], good), (data.ids[one + 1], "a dragon and a a a a"))):
        table.add([dict(id=str(id), variant="x", text=text, how="written")])
    table.write([])
    assert report_captions("scenes", ReportOptions(captions=str(tmp_path), splits=("val",))) == 0
    found = json.loads((tmp_path / "report.json").read_text())["x"]
    second = 1 + 4 * data.row(one + 1)["facts"]["count"]
    assert found["captions"] == found["judged"] == 2
    assert found["recall"]["n"] == 5 + second and round(found["recall"]["value"] * (5 + second)) == 5
    assert found["hallucination"]["n"] == 5 and found["hallucination"]["value"] == 0
    assert found["hallucination"]["low"] < found["hallucination"]["high"] < 0.6
    assert found["unknown"] == {"dragon": 1} and found["written_by"] == {"written": 2}
    assert found["degenerate"]["repeated"]["value"] == 0.5
    [worst] = [json.loads(line) for line in (tmp_path / "worst.jsonl").read_text().splitlines()]
    assert worst["text"] == "a dragon and a a a a" and len(worst["lost"]) == second
    assert "recall" in capsys.readouterr().out


def test_a_report_of_nothing_is_one_line(tmp_path, capsys):
    assert cli.main(["caption", "report", "scenes", "--captions", str(tmp_path)]) == 2
    assert "has no captions; write them first" in capsys.readouterr().err
