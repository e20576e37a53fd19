"""Pictures and table of the world `emoji`, from three unpacked npm packages; the manifest has the licences.

npm pack @lobehub/fluent-emoji-3d@1.1.0 @lobehub/fluent-emoji-flat@1.1.0 emojibase-data@17.0.0
Unpack each into a folder of its own and install cairosvg somewhere; only this tool needs it. Then
PYTHONPATH=.:SITE python tools/build_emoji.py 3D/package FLAT/package EMOJIBASE/package
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from emoji_words import fill, others_of, parts_of, phrase_of, words_of
from sdcourse.data.shards import index_tar, key_of

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "sdcourse" / "pictures"
MANIFEST = ROOT / "data_manifests" / "emoji.json"
SIDE = 64
STEP = 7  # values of pixels lie so far apart, counted from white: WebP without loss then takes half the bytes
# Unicode's order is light, medium-light, medium …; both packages have the files of the second and the third
# exchanged (compare the brightness of any person), so the words here are those of what is seen
TONES = ("", "light", "medium", "medium-light", "medium-dark", "dark")

# what is not in the world: a pattern for "subgroup/name" -> why
LEFT_OUT = {
    r"(country-|subdivision-)?flag/.*": "a flag: 250 of them would be most of all objects",
    r"keycap/.*|alphanum/.*": "letters and digits, no picture",
    r"arrow/[A-Z].*|time/.*(o'clock|-thirty)": "a word on an arrow; a clock in 24 copies",
    r".*/(ATM sign|water closet|ZZZ|copyright|registered|trade mark|no one under eighteen)": "letters",
    r"geometric/.*(medium|small) (square|diamond)": "the same as the large one but for its size",
    r"hand-single-finger/middle finger.*": "rude",
    r"face-negative/face with symbols on mouth|face-costume/pile of poo": "rude",
    r"place-building/love hotel|body-parts/biting lip|.*/.* with bunny ears": "sexual",
    r"person-role/breast-feeding.*": "hardly another picture than a woman feeding a baby",
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


def forms(base, codes):
    "(entry of emojibase, form, name, subgroup, tone): what both packages have and what is not left out."
    subgroups = read(base / "meta/groups.json")["subgroups"]
    for entry in read(base / "en/data.json"):
        for form in [entry, *entry.get("skins", [])] if "group" in entry else []:
            tone = form.get("tone", 0)
            if isinstance(tone, list) or plain(form["hexcode"]) not in codes:
                continue
            name, subgroup = words_of(entry["label"]), subgroups[str(entry["subgroup"])]
            if not why_left_out(subgroup, name, TONES[tone]):
                yield entry, form, name, subgroup, TONES[tone]


def concepts(base, codes):
    "What is known of each concept, in the order of the ids."
    groups = read(base / "meta/groups.json")["groups"]
    every = list(forms(base, codes))
    with_tones = {name for *_, name, _, tone in every if tone}
    found = []
    for entry, form, name, subgroup, tone in every:
        toned = name in with_tones
        phrase = phrase_of(name, subgroup)
        row = {"id": identity(name, tone), "code": plain(form["hexcode"]), "name": name, "toned": toned}
        row |= {"phrase": fill(phrase, tone), "others": [fill(p, tone) for p in others_of(name, phrase)]}
        row |= {"group": groups[str(entry["group"])], "subgroup": subgroup}
        found.append({**row, "parts": parts_of(name, subgroup, tone, toned)})
    return sorted(found, key=itemgetter("id"))


def identity(name, tone):
    "A name for files: woman-firefighter-dark."
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {tone}".lower().replace("'", "")).strip("-")


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


def write_sums():
    "Sizes and checksums of what is shipped, into the manifest."
    manifest = read(MANIFEST)
    for entry in manifest["layouts"]["shipped"]["files"]:
        data = (HOME / entry["path"]).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    MANIFEST.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
    assert len({r["id"] for r in rows}) == len(rows), "two concepts have one name"
    HOME.mkdir(exist_ok=True)
    write_lines(HOME / "concepts.jsonl", rows)
    print(f"{len(rows):,} concepts")
    if not args.table_only:
        tars = [build_style(style, files[style], rows) for style in files]
        index = {"quoted": True, "tars": tars, "left_out": []}
        (HOME / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    write_sums()


if __name__ == "__main__":
    main()
