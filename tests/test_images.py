"""`open_image`: the one door for pictures. What comes through is whole, upright RGB of eight bits; the rest
is refused with its reason.
"""

import contextlib, io, struct, zlib

import numpy as np
import pytest
from PIL import Image

from sdcourse.core import UserError
from sdcourse.data.images import (
    FORMATS,
    MAX_PIXELS,
    BadImage,
    has_colours,
    image_bytes,
    is_turned,
    open_image,
    read_header,
    shrink,
    to_rgb,
)

noise = lambda w, h, c=3, seed=0: np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def as_file(im, format="PNG", **kwargs):
    out = io.BytesIO()
    im.save(out, format, **kwargs)
    return out.getvalue()


def png_claiming(width, height, depth=8):
    "A PNG of a few bytes whose header claims any size; its checksums are right."
    chunk = lambda name, body: (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    )
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def refused(data, **kwargs):
    with pytest.raises(BadImage) as e:
        open_image(data, **kwargs)
    assert (
        isinstance(e.value, UserError) and "\n" not in str(e.value) and str(e.value).startswith(e.value.kind)
    )
    return e.value.kind


# ---- what comes through
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_through_as_rgb(format):
    im = Image.fromarray(noise(31, 17))
    found = open_image(as_file(im, format, **({"lossless": True} if format == "WEBP" else {})))
    assert found.mode == "RGB" and found.size == (31, 17)
    if format in ("PNG", "WEBP", "BMP", "TIFF"):
        assert np.array_equal(np.asarray(found), np.asarray(im))


def test_a_path_and_its_bytes_are_the_same_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(as_file(Image.fromarray(noise(8, 8))))
    assert open_image(tmp_path / "x.png").tobytes() == open_image((tmp_path / "x.png").read_bytes()).tobytes()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_sixteen_bits_are_scaled_not_cut(dtype):
    ramp = np.arange(65536, dtype=dtype).reshape(256, 256)
    found = np.asarray(to_rgb(Image.fromarray(ramp)))
    assert np.array_equal(found, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))


@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_exif_orientations(turn):
    "The stored picture plus its note give the upright one: oracle is a table of numpy operations."
    up = noise(6, 4)
    stored = {
        1: up,
        2: up[:, ::-1],
        3: up[::-1, ::-1],
        4: up[::-1],
        5: up.transpose(1, 0, 2),
        6: np.rot90(up),
        7: up[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(up, -1),
    }[turn]
    note = Image.Exif()
    note[0x0112] = turn
    assert np.array_equal(
        np.asarray(open_image(as_file(Image.fromarray(np.ascontiguousarray(stored)), exif=note))), up
    )


def test_white_behind_transparency():
    rgba = np.concatenate([noise(8, 8), np.zeros((8, 8, 1), np.uint8)], 2)
    rgba[:, 4:, 3] = 255
    found = np.asarray(open_image(as_file(Image.fromarray(rgba))))
    assert (found[:, :4] == 255).all() and np.array_equal(found[:, 4:], rgba[:, 4:, :3])


def test_white_behind_a_transparent_palette_entry():
    im = Image.fromarray(np.repeat([[0, 1]], 2, 0).astype(np.uint8)).convert("P")
    im.putpalette([10, 20, 30, 40, 50, 60])
    found = np.asarray(open_image(as_file(im, transparency=0)))
    assert found[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_grey_and_cmyk_become_rgb():
    for mode in ("L", "LA", "1", "CMYK"):
        assert open_image(as_file(Image.new(mode, (4, 4)), "TIFF")).mode == "RGB"


# ---- what is refused
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("cut", [1, 12, 100, 1000])
def test_truncated(format, cut):
    data = as_file(Image.fromarray(noise(64, 64)), format)
    assert refused(data[:-cut]) in ("truncated", "unreadable")


def test_png_without_end_mark_is_truncated():
    assert refused(as_file(Image.fromarray(noise(64, 64)))[:-12]) == "truncated"


@pytest.mark.parametrize(
    "data",
    [
        b"<html>",
        b"\n <!DOCTYPE html>",
        b"GIF89a",
        b"\xff\xd8\xff",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        bytes(1000),
    ],
)
def test_no_picture(data):
    assert refused(data) == "unreadable"


def test_empty():
    assert refused(b"") == "empty"


def test_bombs_are_refused_before_a_pixel_is_unpacked():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for w, h in ((60_000, 60_000), (20_000, 20_000), (10_001, 10_000), (2**31 - 1, 1)):
        assert refused(png_claiming(w, h)) == "huge"
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    )  # KiB; the third alone is 300 MB


def test_the_pixel_limit_is_exact():
    data = as_file(Image.fromarray(noise(20, 10)))
    assert refused(data, max_pixels=199) == "huge" and open_image(data, max_pixels=200).size == (20, 10)
    assert MAX_PIXELS == 100_000_000


def test_float_pixels_are_refused():
    assert refused(as_file(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")) == "deep"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_random_damage_is_a_reason_and_never_another_exception():
    "Bytes changed anywhere: a picture or a `BadImage`."
    kinds = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = bytearray(
            as_file(
                Image.fromarray(noise(24, 24, seed=seed)),
                rng.choice(["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"]),
            )
        )
        for i in rng.integers(0, min(len(data), 200), 12):
            data[i] = rng.integers(256)
        try:
            kinds.add(open_image(bytes(data)).mode)
        except BadImage as e:
            assert e.kind and e.detail, seed
            kinds.add(e.kind)
        except Exception as e:
            pytest.fail(f"seed {seed}: {e!r}")
    assert {"RGB", "unreadable"} <= kinds <= {"RGB", "unreadable", "truncated", "huge", "deep"}, kinds


def test_header_alone_reads_no_pixels():
    data = as_file(Image.fromarray(noise(64, 64)))
    assert read_header(data[:100] + bytes(100)).size == (64, 64)


# ---- smaller and back
def test_shrink_keeps_the_shape_and_never_enlarges():
    im = Image.fromarray(noise(301, 200))
    assert (
        shrink(im, 100).size == (150, 100)
        and shrink(im, 0) is im
        and shrink(im, 200) is im
        and shrink(im, 999) is im
    )
    assert (
        shrink(Image.new("RGB", (2000, 1)), 1).size == (2000, 1)
        and min(shrink(Image.new("RGB", (3000, 2)), 1).size) == 1
    )


def test_shrink_averages_all_pixels():
    "A fine checkerboard becomes grey; taking single pixels would leave black or white."
    board = np.indices((256, 256)).sum(0) % 2 * 255
    small = np.asarray(shrink(Image.fromarray(np.repeat(board.astype(np.uint8)[..., None], 3, 2)), 32))
    assert abs(small[4:-4, 4:-4].astype(int) - 127).max() <= 2


def test_png_is_lossless_and_jpeg_keeps_full_colour_resolution():
    im = Image.fromarray(noise(32, 32))
    assert open_image(image_bytes(im)).tobytes() == im.tobytes()
    jpeg = image_bytes(im, "JPEG")
    assert (
        read_header(jpeg).layer[0][1:3] == (1, 1)
        and abs(np.asarray(open_image(jpeg)).astype(int) - np.asarray(im)).mean() < 5
    )


# ---- the note
def test_a_picture_that_lies_on_its_side_is_known_without_decoding_it():
    note = Image.Exif()
    note[0x0112] = 6
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        for exif, want in ((note, True), (Image.Exif(), False)):
            data = as_file(Image.fromarray(noise(8, 8)), format, exif=exif)
            assert is_turned(read_header(data), data) == want, format
    cut = as_file(Image.fromarray(noise(64, 64)))[:300]
    assert is_turned(read_header(cut), cut) is False


def test_a_switch_that_lets_cut_pictures_pass_is_refused(monkeypatch):
    "Some packages set it for the whole process; a cut JPEG would then be grey below, without an error."
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = as_file(Image.fromarray(noise(60, 40)), "JPEG")
    for data in (whole, whole[:-900]):
        with pytest.raises(UserError, match="LOAD_TRUNCATED_IMAGES is on"):
            open_image(data)


# ---- damage that a decoder passes over
SMOOTH = Image.fromarray(noise(40, 40)).resize((320, 240), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("quality", [40, 75, 95])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_whose_data_end_early_is_found(quality, subsampling):
    data = as_file(SMOOTH, "JPEG", quality=quality, subsampling=subsampling)
    half = len(data) // 2
    marks = [k + 1 for k in range(half, len(data) - 500) if data[k] == 0xFF][:3]
    for wrong in (
        *(data[: half + n] + data[-2:] for n in range(40)),  # cut, and an end mark behind it
        *(data[:k] + data[-2:] for k in marks),  # cut within a mark
        data[:half] + bytes(len(data) - half),  # a download that was begun
        data[:half] + bytes(2000) + data[half + 2000 :],  # a hole
    ):
        assert refused(wrong) == "truncated"


def test_good_jpegs_with_more_behind_them_or_even_areas_pass():
    data = as_file(SMOOTH, "JPEG")
    for tail in (b"", b"appended", bytes(5000), data):
        assert open_image(data + tail).size == (320, 240)
    for colour in ("white", "black", (128, 128, 128)):
        for optimize in (False, True):
            open_image(as_file(Image.new("RGB", (2000, 2000), colour), "JPEG", optimize=optimize))


GRAINY = Image.blend(SMOOTH, Image.fromarray(noise(320, 240)), 0.2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_progressive_jpeg_whose_data_end_early_is_found(mode):
    "Case 15: cut with an end mark behind the cut, zeros to the end, a hole; in each of its parts."
    data = as_file(GRAINY.convert(mode), "JPEG", progressive=True)
    parts = [k for k in range(len(data) - 1) if data[k : k + 2] == b"\xff\xda"]
    assert len(parts) > 5
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    for k in [*np.linspace(parts[0] + 20, len(data) - 3, 25).astype(int), *(len(data) - n for n in (6, 30))]:
        cut = data[:k].rstrip(b"\xff") + b"\xff\xd9"
        with contextlib.suppress(BadImage):
            lost = np.abs(np.asarray(open_image(cut)).astype(int) - whole).mean()
            assert lost < 0.01, (k, lost)  # what is missing is not to be seen
        for end in (b"", b"\xff\xd9"):
            if len(data) - k > 1100:
                assert refused(data[:k] + bytes(len(data) - k) + end) == "truncated"
    last = parts[-1] + 100
    assert refused(data[:last] + bytes(1100) + data[last + 1100 :]) == "truncated"
    for k in (parts[1], parts[-1], parts[-1] + 50):
        assert refused(data[:k] + b"\xff\xd9") == "truncated"


def test_good_progressive_jpegs_pass():
    wave = 128 + 60 * np.cos(np.arange(640) * 2 * np.pi / 8)
    for im in (
        SMOOTH,
        GRAINY,
        GRAINY.convert("L"),
        GRAINY.convert("CMYK"),
        Image.new("RGB", (2000, 2000), "white"),
        Image.fromarray(np.tile(wave, (640, 1)).astype(np.uint8)),
    ):
        for quality in (30, 90):
            data = as_file(im, "JPEG", progressive=True, quality=quality)
            assert open_image(data + b"appended").size == im.size


def test_parts_that_make_no_sense_are_one_line():
    "Marks of further parts behind a picture that is whole, and headers that end too early."
    data = as_file(SMOOTH, "JPEG")
    for more in (b"\xff\xda\0\2", b"\xff\xda\0\0", b"\xff\xc4\0\2", b"\xff\xc4\xff\xff\x10", b"\xff\xc2\0\0"):
        for end in (b"\xff\xd9", b""):
            with contextlib.suppress(BadImage):
                open_image(data[:-2] + more + end)


def test_a_png_with_megabytes_of_text_is_a_picture():
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_itxt("workflow", "x" * 3_000_000, zip=True)
    note.add_text("more", "y" * 2_000_000, zip=True)
    assert open_image(as_file(SMOOTH, pnginfo=note)).size == (320, 240)


def test_a_format_that_is_not_read_is_named():
    with pytest.raises(BadImage, match="AVIF, which is not read; convert it"):
        open_image(b"\0\0\0\x1cftypavif" + bytes(40))


def adobe_rgb():
    "An ICC profile with the primaries and the gamma of Adobe RGB (1998), from tags of sRGB's."
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.60974, 0.31111, 0.01947),
        b"gXYZ": (0.20528, 0.62567, 0.06087),
        b"bXYZ": (0.14919, 0.06322, 0.74457),
    }
    for k in range(struct.unpack(">I", data[128:132])[0]):
        name, at, _ = struct.unpack(">4sII", data[132 + 12 * k : 144 + 12 * k])
        for i, x in enumerate(primaries.get(name, ())):
            struct.pack_into(">i", data, at + 8 + 4 * i, round(x * 65536))
    return bytes(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_are_those_of_the_profile(format):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format, {})
    im = Image.new("RGB", (16, 16), (100, 180, 90))
    data = as_file(im, format, icc_profile=adobe_rgb(), **options)
    seen = open_image(data)
    r, g, b = seen.getpixel((8, 8))
    assert r < 60 and 176 <= g <= 188 and "icc_profile" not in seen.info and has_colours(read_header(data))
    assert (
        max(abs(a - b) for a, b in zip(open_image(data, upright=False).getpixel((8, 8)), (100, 180, 90))) <= 2
    )
    assert np.array_equal(np.asarray(open_image(image_bytes(seen))), np.asarray(seen))  # not converted twice


def test_the_profile_of_srgb_and_broken_ones_change_nothing():
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", adobe_rgb()[:200]):
        data = as_file(SMOOTH, icc_profile=profile)
        assert np.array_equal(np.asarray(open_image(data)), np.asarray(SMOOTH)) and not has_colours(
            read_header(data)
        )
