"""Inputs of public bug reports that no other file of tests holds: each with what must come of it."""

import io

import numpy as np
import pytest
from PIL import Image

from hostile import lay_what_is_no_file
from sdcourse import cli
from sdcourse.core import read_json
from sdcourse.data.images import BadImage, open_image
from sdcourse.dataset import pictures

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def stored(im, format, **options):
    out = io.BytesIO()
    im.save(out, format, **options)
    return out.getvalue()


def laid(folder, **files):
    "A folder of files; the name with its suffix after two underscores."
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def scanned(folder, *options):
    "(exit code, the list)"
    code = cli.main(["scan", str(folder), "--limit", "0.9", *options])
    return code, read_json(folder / "scan.json") if (folder / "scan.json").is_file() else None


def test_a_profile_of_megabytes_is_no_damage():
    "Case 13: Pillow limits what a PNG may unpack."
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = stored(NOISE, "PNG", icc_profile=profile + bytes(2_000_000))
    assert open_image(data).size == (64, 48)


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF"])
def test_a_cut_file_of_any_format_is_refused(format):
    "Case 15: half of the file is gone."
    data = stored(NOISE, format)
    assert open_image(data).size == (64, 48)
    with pytest.raises(BadImage):
        open_image(data[: len(data) // 2])


def test_suffixes_in_any_case_are_read_and_others_counted(tmp_path, caplog):
    "Case 24: .PNG, .JPeG, .jpe and .jfif are pictures; .jp2 is said."
    suffixes = ["PNG", "JPeG", "jfif", "jpe", *["png"] * 20]
    for i, suffix in enumerate(suffixes):
        pixels = np.random.default_rng(i).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        format = "PNG" if suffix.lower() == "png" else "JPEG"
        laid(tmp_path, **{f"{i}__{suffix}": stored(Image.fromarray(pixels), format)})
    laid(tmp_path, e__jp2=b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(50))
    found = pictures(tmp_path)
    assert set(found.ids) == {str(i) for i in range(len(suffixes))} and "e.jp2" in caplog.text
    whole = (tmp_path / "2.jfif").read_bytes()
    laid(tmp_path, **{"2__jfif": whole[: len(whole) // 2]})
    code, listed = scanned(tmp_path)
    assert [b["file"] for b in listed["bad"]] == ["2.jfif"]


def test_a_scan_names_a_format_that_hides_behind_a_suffix(tmp_path):
    "Case 25: AVIF, called .jpg by a network of caches."
    laid(tmp_path, a__png=stored(NOISE, "PNG"), b__jpg=b"\0\0\0\x1cftypavif" + bytes(40))
    code, listed = scanned(tmp_path)
    assert [b["file"] for b in listed["bad"]] == ["b.jpg"] and "AVIF" in str(listed["bad"][0])


@pytest.mark.parametrize("kind", ["pipe", "device", "name"])
def test_a_scan_ends_in_one_line_where_no_file_is(tmp_path, capsys, kind):
    "Cases 27 and 29: it never reads from a pipe or a device, and leaves no journal that blocks readers."
    laid(tmp_path, a__png=stored(NOISE, "PNG"))
    lay_what_is_no_file(tmp_path, kind)
    code, listed = scanned(tmp_path)
    said = capsys.readouterr()
    assert "Traceback" not in said.err and not (tmp_path / "scan.json.partial").exists()
    if code == 2:
        assert said.err.count("\n") == 1 and listed is None
    else:
        assert len(listed["bad"]) == 1


def test_a_profile_is_odd_and_not_bad(tmp_path):
    "Case 14: it is listed, for its pixels are converted when they are read."
    from test_images import adobe_rgb

    laid(tmp_path, a__png=stored(NOISE, "PNG", icc_profile=adobe_rgb()))
    listed = scanned(tmp_path)[1]
    assert not listed["bad"] and "colours" in str(listed["odd"])


def test_tars_of_dotted_names_alone_are_refused(tmp_path, capsys):
    "Case 19: nothing could be read of them, and the exit code said 0."
    import tarfile

    with tarfile.open(tmp_path / "a-0.tar", "w") as tar:
        for name in ("22.01.png", "22.02.png"):
            info = tarfile.TarInfo(name)
            data = stored(NOISE, "PNG")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert cli.main(["shards", str(tmp_path), str(tmp_path)]) == 2
    assert "22.01.png" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_exif_turns_pictures_of_every_format(format, orientation):
    "Case 42: the eight orientations, and one that does not exist."
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if format == "WEBP" else dict(quality=95)
    found = open_image(stored(NOISE, format, exif=exif, **options))
    assert found.size == ((48, 64) if orientation > 4 else (64, 48))
    exif[0x0112] = 99
    assert open_image(stored(NOISE, format, exif=exif, **options)).size == (64, 48)
