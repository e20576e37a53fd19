"""Make the pictures and the table of the world `emoji` from unpacked npm packages (see data_manifests/emoji.json).

npm pack @lobehub/fluent-emoji-3d@1.1.0 @lobehub/fluent-emoji-flat@1.1.0 emojibase-data@17.0.0
Unpack each into a folder of its own and install cairosvg somewhere; only this tool needs it. Then
PYTHONPATH=.:SITE python tools/build_emoji.py 3D/package FLAT/package EMOJIBASE/package
"""

import argparse
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from sdcourse.data.shards import index_tar, key_of

HOME = Path(__file__).resolve().parent.parent / "sdcourse" / "pictures"
SIDE = 64
STEP = 7  # values of pixels lie so far apart, counted from white: WebP without loss then takes half the bytes
# Unicode's order is light, medium-light, medium …; both packages have the files of the second and the third
# exchanged (compare the brightness of any person), so the words here are those of what is seen
TONES = ("", "light", "medium", "medium-light", "medium-dark", "dark")

# what is not in the world: a pattern for "subgroup/name" -> why
LEFT_OUT = {
    r"(country-|subdivision-)?flag/.*": "a flag: 250 of them would be most of all objects",
    r"keycap/.*|alphanum/.*": "letters and digits, no picture",
    r"arrow/[A-Z].*|time/.*(o’clock|-thirty)": "a word on an arrow; a clock in 24 copies",
    r".*/(ATM sign|water closet|ZZZ|copyright|registered|trade mark|no one under eighteen)": "letters",
    r"geometric/.*(medium|small) (square|diamond)": "the same as the large one but for its size",
    r"hand-single-finger/middle finger.*": "rude",
    r"face-negative/face with symbols on mouth|face-costume/pile of poo": "rude",
    r"place-building/love hotel|body-parts/biting lip|.*/.* with bunny ears": "sexual",
    r"person-role/breast-feeding.*": "the same picture as a woman feeding a baby",
    r"animal-mammal/cat face": "the same file as grinning cat",
    r"person-role/(man|woman) astronaut.*|person-role/man guard.*": "the same picture as astronaut, guard",
    r"person-sport/(snowboarder|horse racing) .+|.*/person in suit levitating .+": "the tone is not seen",
    r"person-role/pregnant person dark": "the same picture as with medium-dark skin",
    r"person/(person|man|woman): blond hair medium-light": "the same picture as without blond hair",
    r"person-sport/person mountain biking .+": "the tones of the 3-D pictures are exchanged",
    r"person-resting/person taking bath medium-dark": "the flat picture has no tone",
}


def why_left_out(subgroup, name, tone):
    "The reason, or nothing."
    where = f"{subgroup}/{name} {tone}".strip()
    return next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, where)), "")


def plain(code):
    "A code as both packages and emojibase have it."
    return code.lower().replace("-fe0f", "")


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def concepts(base, codes):
    "Rows of emojibase that are in both packages and are not left out."
    words = read(base / "meta/groups.json")
    found = []
    for entry in read(base / "en/data.json"):
        if "group" not in entry:
            continue
        subgroup = words["subgroups"][str(entry["subgroup"])]
        name = entry["label"]
        for form in [entry, *entry.get("skins", [])]:
            tone = form.get("tone", 0)
            if isinstance(tone, list) or plain(form["hexcode"]) not in codes:
                continue
            if why_left_out(subgroup, name, TONES[tone]):
                continue
            found.append(
                {
                    "code": plain(form["hexcode"]),
                    "name": name,
                    "tone": TONES[tone],
                    "group": words["groups"][str(entry["group"])],
                    "subgroup": subgroup,
                    "words": entry.get("tags", []),
                }
            )
    return found


def identity(concept):
    "A name for files: woman-firefighter-dark."
    words = f"{concept['name']} {concept['tone']}".lower().replace("ñ", "n")
    return re.sub(r"[^a-z0-9]+", "-", words.replace("’", "")).strip("-")


def on_white(im):
    "A square on white, its side 64 pixels, values rounded to steps."
    im = im.convert("RGBA")
    side = max(im.size)
    sheet = Image.new("RGBA", (side, side), "white")
    sheet.alpha_composite(im, ((side - im.width) // 2, (side - im.height) // 2))
    small = np.asarray(sheet.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int32)
    darker = (255 - small + STEP // 2) // STEP * STEP
    return Image.fromarray((255 - darker.clip(0, 255)).astype(np.uint8))


def picture_of(path):
    "What a file shows."
    if path.suffix == ".webp":
        return on_white(Image.open(path))
    import cairosvg

    return on_white(Image.open(io.BytesIO(cairosvg.svg2png(url=str(path), output_width=256))))


def webp(im):
    out = io.BytesIO()
    im.save(out, "WEBP", lossless=True, quality=75, method=6)
    return out.getvalue()


def write_tar(path, members):
    "The same bytes for the same members: no times, no owners."
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))


def write_lines(path, rows):
    lines = (json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    Path(path).write_text("".join(lines), encoding="utf-8")


def build_style(style, files, rows):
    "One tar with its index; its entry for index.json."
    members = ((f"{key_of(r['id'])}.webp", webp(picture_of(files[r["code"]]))) for r in rows)
    path = HOME / f"{style}.tar"
    write_tar(path, members)
    write_lines(HOME / f"{style}.index.jsonl", index_tar(path)[0])
    return {
        "tar": path.name,
        "split": style,
        "index": f"{style}.index.jsonl",
        "samples": len(rows),
        "bytes": path.stat().st_size,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("threed", "flat", "emojibase"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--table-only", action="store_true", help="leave the tars as they are")
    args = parser.parse_args()
    files = {
        style: {plain(p.stem): p for p in sorted((folder / "assets").iterdir())}
        for style, folder in (("3d", args.threed), ("flat", args.flat))
    }
    rows = concepts(args.emojibase, files["3d"].keys() & files["flat"].keys())
    rows = sorted(({"id": identity(r), **r} for r in rows), key=lambda r: r["id"])
    assert len({r["id"] for r in rows}) == len(rows), "two concepts have one name"
    HOME.mkdir(exist_ok=True)
    write_lines(HOME / "concepts.jsonl", rows)
    print(f"{len(rows):,} concepts")
    if args.table_only:
        return
    tars = [build_style(style, files[style], rows) for style in files]
    index = {"quoted": True, "tars": tars, "left_out": []}
    (HOME / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
