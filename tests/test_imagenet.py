"ImageNet: the published crop to the pixel, folders and parquet alike, and the same pictures from both."

import io, json, shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from hostile import picture
from sdcourse import cli
from sdcourse.core import UserError
from sdcourse.data.imagefolder import read_lines
from sdcourse.data.images import centre_crop
from sdcourse.data.sets.digits import digits
from sdcourse.data.sets.imagenet import DIGIT_NAMES, read_folders, read_parquet

SIZES = [
    (500, 375),
    (375, 500),
    (256, 256),
    (257, 255),
    (512, 512),
    (511, 513),
    (1024, 768),
    (1023, 771),
    (2048, 1365),
    (100, 80),
    (80, 333),
    (64, 64),
    (31, 47),
    (300, 1000),
    (999, 257),
    (640, 427),
    (427, 640),
    (1500, 258),
    (200, 200),
    (769, 1025),
]


def reference(array, side):
    """The crop as the paper's code describes it, written without `centre_crop`: recursion instead of a loop,
    sizes by fractions, and the cut on the array.
    """
    h, w, _ = array.shape
    if min(h, w) // 2 >= side:
        return reference(
            np.asarray(Image.fromarray(array).resize((int(w / 2), int(h / 2)), resample=Image.BOX)), side
        )
    short = min(h, w)
    big = np.asarray(
        Image.fromarray(array).resize(
            tuple(int(np.rint(v * (side / short))) for v in (w, h)), resample=Image.BICUBIC
        )
    )
    y, x = ((n - side) // 2 for n in big.shape[:2])
    return big[y:, x:][:side, :side]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_crop_is_adms(size):
    rng = np.random.default_rng(size[0])
    array = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for side in (256, 64):
        ours = np.asarray(centre_crop(Image.fromarray(array), side))
        assert ours.shape == (side, side, 3) and np.abs(ours.astype(int) - reference(array, side)).max() == 0


def test_grey_cmyk_and_palette_become_rgb():
    for mode in ("L", "CMYK", "P", "RGBA", "LA"):
        assert centre_crop(Image.new(mode, (40, 30)), 16).mode == "RGB"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "folders"
    assert cli.run(["prepare", "digits", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    pytest.importorskip("pyarrow")
    out = tmp_path_factory.mktemp("digits") / "hub"
    assert cli.run(["prepare", "digits", str(out), "--layout", "parquet"]) == 0
    return out


def pictures(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def check_against_digits(out):
    for split, own in (("train", "train"), ("val", "test")):
        table, rows = digits(own).tensors, read_lines(out / split / "metadata.jsonl")
        where = {i: k for k, i in enumerate(table["id"].tolist())}
        assert len(rows) == len(table["id"]) == len({r["id"] for r in rows})
        for r in rows:
            k = where[int(r["id"].split("_")[1])]
            pixels = np.asarray(Image.open(out / split / r["file_name"]))
            assert r["label"] == table["label"][k] and r["class"] == DIGIT_NAMES[r["label"]]
            assert np.array_equal(
                pixels[..., 0], ((table["pixels"][k, 0] + 1) * 127.5).round().byte().numpy()
            ) and pixels.shape == (8, 8, 3)


def test_digits_survive_the_way_through_folders(folders, tmp_path):
    assert (
        cli.run(["prepare", "imagenet", str(folders), str(tmp_path / "o"), "--size", "8", "--workers", "2"])
        == 0
    )
    check_against_digits(tmp_path / "o")
    classes = json.loads((tmp_path / "o/classes.json").read_text())
    assert [c["name"] for c in classes] == list(DIGIT_NAMES) and classes[3] == {
        "label": 3,
        "name": "three",
        "folder": "d00000003",
    }


def test_digits_survive_the_way_through_parquet(hub, tmp_path):
    assert (
        cli.run(["prepare", "imagenet", str(hub), str(tmp_path / "o"), "--size", "8", "--workers", "2"]) == 0
    )
    check_against_digits(tmp_path / "o")


def test_folders_and_parquet_give_the_same_files(folders, hub, tmp_path):
    for source in (folders, hub):
        assert (
            cli.run(
                [
                    "prepare",
                    "imagenet",
                    str(source),
                    str(tmp_path / source.name),
                    "--size",
                    "16",
                    "--per-class",
                    "5",
                    "--workers",
                    "1",
                ]
            )
            == 0
        )
    a, b = pictures(tmp_path / "folders"), pictures(tmp_path / "hub")
    drop = lambda d: {k: v for k, v in d.items() if k.endswith(".png")}
    assert drop(a) == drop(b) and len(drop(a)) == 100


def test_parquet_names_and_labels_come_from_the_file(hub):
    names, _, rows = read_parquet(hub)
    assert (
        names == list(DIGIT_NAMES)
        and Counter(r[0] for r in rows) == {"train": 1437, "val": 360}
        and rows[150][3][1:] == (1, 50)
    )


def small(tmp_path, flat=False):
    "Two classes with odd suffixes and sizes; a validation part in folders, or flat."
    for synset, colour in (("n02", (255, 0, 0)), ("n01", (0, 255, 0))):
        for split in ("train", "val"):
            folder = tmp_path / "src" / split / ("" if flat and split == "val" else synset)
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), colour).save(folder / f"{split}_{synset}.JPEG")
    (tmp_path / "src/LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    return tmp_path / "src"


@pytest.mark.parametrize("flat", [False, True])
def test_classes_are_sorted_synsets_and_validation_may_be_flat(tmp_path, flat):
    source = small(tmp_path, flat)
    if flat:
        with pytest.raises(UserError, match="LOC_val_solution.csv"):
            read_folders(source)
        (source / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\nval_n01,n01 1 2 3 4\nval_n02,n02 1 2 3 4 n02 5 6 7 8\n"
        )
    names, synsets, rows = read_folders(source)
    assert names == ["tench, Tinca tinca", "goldfish"] and synsets == ["n01", "n02"]
    assert sorted((r[0], r[1], r[2]) for r in rows) == [
        ("train", 0, "train_n01"),
        ("train", 1, "train_n02"),
        ("val", 0, "val_n01"),
        ("val", 1, "val_n02"),
    ]
    assert (
        cli.run(
            [
                "prepare",
                "imagenet",
                str(source),
                str(tmp_path / "o"),
                "--size",
                "8",
                "--workers",
                "1",
                "--format",
                "jpg",
            ]
        )
        == 0
    )
    for r in read_lines(tmp_path / "o/val/metadata.jsonl"):
        assert np.asarray(Image.open(tmp_path / "o/val" / r["file_name"]))[4, 4].argmax() == (
            1 if r["label"] == 0 else 0
        ) and r["file_name"].endswith(".jpg")


def test_ilsvrc_layout_below_the_root(tmp_path):
    source = small(tmp_path)
    (tmp_path / "root/ILSVRC/Data").mkdir(parents=True)
    shutil.move(source, tmp_path / "root/ILSVRC/Data/CLS-LOC")
    assert len(read_folders(tmp_path / "root")[2]) == 4


def test_a_validation_class_that_training_lacks_is_refused(tmp_path):
    source = small(tmp_path)
    shutil.rmtree(source / "train/n02")
    with pytest.raises(UserError, match="'n02' has no folder in train"):
        read_folders(source)


def test_a_broken_picture_is_reported(tmp_path):
    source = small(tmp_path)
    (source / "train/n01/bad.JPEG").write_bytes((source / "train/n01/train_n01.JPEG").read_bytes()[:200])
    with pytest.raises(UserError, match="train/0000/bad.png .unreadable"):
        cli.run(["prepare", "imagenet", str(source), str(tmp_path / "o"), "--workers", "1"])
    assert (
        cli.run(
            ["prepare", "imagenet", str(source), str(tmp_path / "o"), "--workers", "1", "--max-bad", "0.5"]
        )
        == 0
    )
    assert [r["where"] for r in read_lines(tmp_path / "o/failures.jsonl")] == ["train/0000/bad.png"] and len(
        read_lines(tmp_path / "o/train/metadata.jsonl")
    ) == 2


def test_parquet_without_labels_or_names_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "PNG")
    row = {"image": {"bytes": buffer.getvalue(), "path": "a.png"}, "label": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="names no classes"):
        read_parquet(tmp_path)
    pq.write_table(pa.Table.from_pylist([{"picture": 1}]), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="image and label are needed"):
        read_parquet(tmp_path)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_parquet(tmp_path)


def test_unlabelled_rows_are_left_out_and_counted(tmp_path, caplog):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    meta = {
        "huggingface": json.dumps(
            {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
        )
    }
    labels = [1, -1, 0, *[0] * 20, None]
    rows = [{"image": {"bytes": b"", "path": None}, "label": k} for k in labels]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(meta), tmp_path / "train-0.parquet")
    read = read_parquet(tmp_path)[2]
    assert [(r[1], r[2]) for r in read[:2]] == [(1, "train-0-0-0"), (0, "train-0-0-2")] and len(read) == 22
    assert "2 of 24 rows have no label, the first is train-0-0-1" in caplog.text


def hub_part(path, *rows, names=("x", "y")):
    "A parquet file of (bytes or None, label, name) as the hub keeps it."
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    about = json.dumps({"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}})
    schema = pa.schema([("image", kind), ("label", pa.int64())], {"huggingface": about})
    cells = [None if data is None else {"bytes": data, "path": name} for data, _, name in rows]
    dicts = [{"image": cell, "label": label} for cell, (_, label, _) in zip(cells, rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(dicts, schema), path)


def prepared(tmp_path, *words):
    "The classes, ids and counts of `sdcourse prepare imagenet`; or its one line."
    out = tmp_path / "out"
    try:
        cli.run(
            ["prepare", "imagenet", str(tmp_path / "in"), str(out), "--size", "8", "--workers", "1", *words]
        )
    except UserError as e:
        assert "\n" not in str(e) and not out.exists()
        return str(e)
    lines = (out / "train/metadata.jsonl").read_text().splitlines()
    return [(r["id"], r["label"]) for r in map(json.loads, lines)]


def test_pictures_of_one_name_in_many_folders_are_prepared(tmp_path):
    "Case 35: own folders, whose pictures are all called 1, and parquet rows that are all called image.png."
    for n, c in enumerate(("cat", "dog")):
        (tmp_path / "in/train" / c).mkdir(parents=True)
        (tmp_path / "in/train" / c / "1.png").write_bytes(picture(20, 16, seed=n, format="PNG"))
    assert prepared(tmp_path) == [("train-cat-1", 0), ("train-dog-1", 1)]
    (tmp_path / "in/train").rename(tmp_path / "in/elsewhere")
    shutil.rmtree(tmp_path / "out")
    assert "put folders of classes into train/" in prepared(tmp_path)


def test_a_table_of_the_validation_set_with_other_columns_is_one_line(tmp_path):
    "Case 35."
    (tmp_path / "in/train/n01").mkdir(parents=True)
    (tmp_path / "in/train/n01/a.png").write_bytes(picture(20, 16, format="PNG"))
    (tmp_path / "in/val").mkdir()
    (tmp_path / "in/val/b.png").write_bytes(picture(20, 16, format="PNG"))
    for text in ("id,label\nb,n01\n", "ImageId,PredictionString\nb,\n", "", '"'):
        (tmp_path / "in/LOC_val_solution.csv").write_text(text)
        said = prepared(tmp_path)
        assert "needs the columns ImageId" in said or "has no folder in train" in said


def test_parquet_rows_that_lack_something(tmp_path):
    "Case 35: a row without picture, one without label, one of a class that is not there, names of all kinds."
    home = tmp_path / "in/data"
    good = [(picture(20, 16, seed=i, format="PNG"), i % 2, "image.png") for i in range(20)]
    hub_part(home / "train-00000-of-00001.parquet", *good, (None, 0, ""), (good[0][0], None, "x.png"))
    assert "1 of 21 pictures cannot be read" in prepared(tmp_path)
    shutil.rmtree(tmp_path / "out.partial")
    rows = prepared(tmp_path, "--max-bad", "0.1")
    assert len(rows) == 20 and rows[3] == ("train-00000-of-00001-0-3", 1)
    shutil.rmtree(tmp_path / "out")
    hub_part(home / "train-00000-of-00001.parquet", *good, (good[0][0], 7, "x.png"))
    assert "row 0-20 has label 7, and there are 2 classes" in prepared(tmp_path)
    (home / "train-00000-of-00001.parquet").rename(home / "0000.parquet")
    assert "0000.parquet is called neither train-… nor validation-…" in prepared(tmp_path)


def test_pictures_in_a_column_of_bytes_are_refused_with_a_remedy(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "in/train-0.parquet")
    assert "its image column has no bytes and path; save it with datasets" in prepared(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/train-0.parquet").write_bytes(b"")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install -c constraints.txt pyarrow"):
        cli.run(["prepare", "imagenet", str(tmp_path / "hub"), str(tmp_path / "o")])
    with pytest.raises(UserError, match="pip install -c constraints.txt pyarrow"):
        cli.run(["prepare", "digits", str(tmp_path / "d"), "--layout", "parquet"])


@pytest.mark.parametrize(
    "argv, words",
    [
        (["x"], "expected SRC OUT"),
        (["nowhere", "o"], "no such folder"),
        (["nowhere", "o", "--fromat", "png"], "did you mean '--format'?"),
        (["nowhere", "o", "--format", "gif"], "one of png, jpg"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        cli.run(["prepare", "imagenet", *argv])
    assert words in str(e.value) and "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_is_cropped_are_the_pixels_as_they_are_stored(tmp_path):
    "ADM knows no EXIF note: the published pixels of a turned photograph lie on their side, to the pixel."
    source, note = small(tmp_path), Image.Exif()
    note[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        Image.fromarray(pixels).convert(mode).save(source / f"train/n01/{mode}.JPEG", exif=note)
    assert (
        cli.run(["prepare", "imagenet", str(source), str(tmp_path / "o"), "--size", "32", "--workers", "1"])
        == 0
    )
    for mode in ("RGB", "L", "CMYK"):
        with Image.open(source / f"train/n01/{mode}.JPEG") as image:
            want = reference(np.asarray(image.convert("RGB")), 32)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"o/train/0000/{mode}.png")), want)


def test_hidden_folders_are_no_classes(tmp_path):
    source = small(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (source / "train" / name).mkdir()
    names, synsets, rows = read_folders(source)
    assert synsets == ["n01", "n02"] and {r[1] for r in rows} == {0, 1}
