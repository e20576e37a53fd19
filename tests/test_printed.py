"""X4: every command that is printed in README, lessons, notebooks and slurm/ runs at tiny size in one folder,
in the order of the pages, with only names exchanged; what cannot run here is refused as the table says.
"""

import json
import re
import shlex
import shutil
from functools import cache
from pathlib import Path

import pytest

import tiny_models
from sdcourse import cli
from sdcourse.config import TrainConfig, kinds
from sdcourse.core import named
from sdcourse.train.__main__ import TASKS, task_module
from test_mile import photo

ROOT = Path(__file__).resolve().parent.parent

# ---- the table of exchanges: nothing else differs from what is printed
NAMES = {  # what stands for something that must be fetched
    "unsplash-lite": "{home}/source",
    "unsplash-research-dataset-lite": "{home}/source",
    "CelebAMask-HQ": "{home}/drawn/faces/CelebAMask-HQ",
    "CelebA": "{home}/drawn/faces/CelebA",
    "ILSVRC": "{home}/src",
    "~/Pictures/cats": "{home}/cats",
    "dinov2:FOLDER": "dinov2:{dino}",
    "clip:FOLDER": "clip:{clip}",
    **dict.fromkeys(("sd-vae", "sd-vae-ft-ema", "VAE", "tiny-vae"), "{vae}"),
    **dict.fromkeys(
        ("MODEL", "stable-diffusion-v1-5/stable-diffusion-v1-5", "tiny-sd15", "base-folder"), "{model}"
    ),
    "runs/x/export": "runs/sd15-full/export",
    "runs/sd15": "runs/sd15-full",
    "runs/sd15/checkpoints/step-00004000": "runs/sd15-full/checkpoints/step-00000002",
    "runs/sd/checkpoints/step-00000060": "runs/sd/checkpoints/step-00000002",
}
SMALL = {  # words that make it tiny, by the words that a command begins with; later ones count
    "cache": "--device cpu --threads 1 --max-samples 6 --workers 1",
    "cache latents": "--size 32",
    "prepare": "--workers 1",
    "prepare photos": "--crops 1",
    "prepare unsplash": "--size 32",
    "prepare imagenet": "--size 32",
    "prepare celeba CelebA": "--min-side 40",
    "prepare folder": "--size 32",
    "generate": "--device cpu --threads 1 --num-inference-steps 1",
    "evaluate": "--device cpu --threads 1 --draws 5 --pictures 0 --force",
    "train": "--device cpu --threads 1 --max-steps 2 --batch-size 2 --log-every 1 --num-workers 0",
    "train vae": "--share 0.01 --micro-batch 0",
    "train nets": "--share 0.01 --micro-batch 0",
    "train contrast": "--share 0.01 --micro-batch 0",
    "train sd15": "--model {model} --image-size 32 --micro-batch 1 --num-inference-steps 1 --num-samples 0",
    "train sd3": "--model {sd3} --image-size 32 --micro-batch 1 --num-inference-steps 1 --num-samples 0 --data {home}/own --latents= "
    "--prompts= --weights= --caption-column= --lora-blocks 0 --lora-rank 2",
    "train sd15 --preset onepiece": "--data {home}/own",
    "train sd15 --preset 24gb": "--data {home}/own",
    "train flow_dit --preset full452m": "--data digits",
    "train flow_dit": "--size tiny/4 --micro-batch 1 --no-compile --num-inference-steps 1 --num-samples 0",
    "sweep": "--size tiny/4",
}
FEW = ("--max-samples 4", "--per-class 1")  # of generate, without and with --classes
LATER = {  # what cannot run here, and how far it is checked
    "train sd15 --preset onepiece": "--precision fp16: needs a GPU",
    "import-flow-dit": "no such folder",
    "generate published-dit": "no such folder",
    "verify unsplash-lite": 1,  # the true tables have other checksums
    "--extractor inception": "inception",
    "--lpips alex": "alex",
    "caption blip2": "hf download",
    "caption llama3": "write them first",
}
BEFORE = {  # what a page says in words only
    "generate runs/flow_dit-tiny": ["train flow_dit --preset tiny"],  # make train
    "evaluate out/w1": [
        f"generate base-folder out/w{w} --data data/unsplash --split test --guidance-scale {w}"
        for w in (1, 2, 3)
    ],
}


# ---- what is printed
def loops(block):
    def body(m):
        return "".join(f"{v}={value}\n{m[3]}\n" for v, value in ((m[1], x) for x in m[2].split()))

    return re.sub(r"for (\w+) in ([^;]+); do\n(.*?)\ndone", body, block, flags=re.S)


def lines_of(block):
    "The commands of a piece of shell, its variables and loops filled in."
    known = {}
    for line in loops(block.replace("\\\n", " ")).splitlines():
        if re.fullmatch(r"(\s*\w+=(\"[^\"]*\"|\S*);?)+\s*(#.*)?", line):
            known |= dict(w.rstrip(";").split("=", 1) for w in shlex.split(line, comments=True))
            continue
        filled = re.sub(r"\$(\w+)", lambda m: known.get(m[1], m[0]), line)
        for one in filled.split(" && "):
            yield one.strip()


def words_of(line):
    "The words after `sdcourse`, whoever starts them; None when it is another command."
    try:
        words = shlex.split(line, comments=True)
    except ValueError:
        return None
    if words and words[0] in ("srun", "torchrun", "accelerate"):
        at = next(
            (i for i, w in enumerate(words) if w.endswith("sdcourse") or w.startswith("sdcourse.")), None
        )
        words = words[at:] if at else []
    if words[:1] == ["sbatch"]:
        at = next((i for i, w in enumerate(words) if re.fullmatch(r"slurm/\w+\.sbatch", w)), None)
        return [Path(words[at]).stem, *words[at + 1 :]] if at else None
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    head = words[0].removeprefix(".venv/bin/") if words else ""
    start = {"sdcourse": [], "sdcourse.train": ["train"], "sdcourse.cli": []}.get(head)
    return None if start is None or len(words) < 2 else start + words[1:]


def sh_words(text):
    "The steps of a file for slurm/pipeline.sh."
    for name, words in re.findall(r"^([A-Z]+)=\((.*)\)$", text, re.M):
        if name != "SBATCH":
            yield [name.lower(), *shlex.split(words)]


@cache
def printed():
    "[(page, words, whether it stands in a block of its own)] in the order of reading."
    lessons = sorted((ROOT / "nbs").glob("0*.ipynb"))
    others = sorted(
        p for p in (ROOT / "nbs").rglob("*.ipynb") if p not in lessons and p.name != "index.ipynb"
    )
    pages = [lessons[1], lessons[2], ROOT / "README.md", *lessons, *others]  # data first
    found = []
    for page in pages:
        name = page.relative_to(ROOT).as_posix()
        texts = [page.read_text()]
        if page.suffix == ".ipynb":
            texts = [
                "".join(c["source"]) for c in json.loads(texts[0])["cells"] if c["cell_type"] == "markdown"
            ]
        for text in texts:
            fences = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
            for block in [m[2] for m in fences.finditer(text) if m[1] in ("", "sh", "bash")]:
                found += [(name, w, True) for w in map(words_of, lines_of(block)) if w]
            for piece in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", fences.sub("", text)):
                found += [(name, w, False) for w in [words_of(piece)] if w]
    for file in sorted((ROOT / "slurm").iterdir()):
        said = re.findall(r"^#\s+(sbatch .*|sdcourse .*)$", file.read_text(), re.M)
        steps = [w for w in map(words_of, said) if w] + list(sh_words(file.read_text()))
        found += [(f"slurm/{file.name}", w, True) for w in steps]
    return found


def is_pattern(words):
    "Whether a line says how commands look, with words to be exchanged by the reader."
    return any(re.fullmatch(r"[A-Z][A-Z_]*|.*[…|{].*", w) for w in words[1:] if w not in NAMES)


def test_printed_commands_are_found():
    found = printed()
    pages = {page for page, _, _ in found}
    lessons = {
        f"nbs/{n}.ipynb" for n in ("01_dataset", "03_sd15", "06b_flow_dit", "07_evaluation", "09_cluster")
    }
    assert pages >= lessons | {"README.md", "slurm/train.sbatch", "slurm/pipeline.example.env"}
    assert ["scan", "data/celeba"] in [w for _, w, _ in found] and len(found) > 150
    assert list(lines_of('A="x y"; B=z\nrun $A $B $C # said\nfor d in a b; do\n  go $d && on\ndone')) == [
        "run x y z $C # said", "go a", "on", "go b", "on",
    ]  # fmt: skip


OURS = {"preset", "config", "print_config", "help", "vary", "index", "table"}


def checked(words):
    "`UserError` or a failure unless verb, places and options are there; values are typed when it runs."
    verb, rest = cli.choose(words)
    row = cli.VERBS.get(verb)
    if not rest or not row.options or rest == ["--help"]:
        return
    if row.options == cli.WORDS or verb == "bench":
        places, options = rest[:1], rest[1:]
        cls = task_module(places[0]).Config if places[0] in TASKS else None
    else:
        places, options = cli.split([w for w in rest if w != "…"], row.places, verb)
        cls = named(f"{row.call.partition(':')[0]}:{row.options}")
    names = [w[2:].partition("=")[0].replace("-", "_") for w in options if w.startswith("--")]
    known = OURS | set(kinds(cls)) if cls else names
    if verb == "bench":
        known |= {"size", "batch", "precision", "compile", "compare"}
    lost = [n for n in names if n not in known and n.removeprefix("no_") not in known]
    assert not lost, (words, lost)


@pytest.mark.parametrize("page", sorted({page for page, _, _ in printed()}))
def test_verbs_places_and_options_of_printed_commands_are_there(page):
    for words in {tuple(w) for p, w, _ in printed() if p == page}:
        kinds = words[1].split("|") if len(words) > 1 else []
        each = [[words[0], kind, *words[2:]] for kind in kinds] if kinds[1:] else [list(words)]
        for some in each:
            bare = some[1:2] in (["KIND"], ["SET"], ["NAME"], ["VERB"], ["…"]) or words[0] in ("VERB", "…")
            checked(some[:1] if bare and words[0] in cli.choices() else [] if bare else some)


def test_our_names_in_the_table_of_options_are_there():
    text = "".join(
        "".join(c["source"]) for c in json.loads((ROOT / "nbs/95_sources.ipynb").read_text())["cells"]
    )
    ours = re.findall(r"`((?:train|cache|caption|prepare|generate|look|copy-images)[^`]*) --([\w-]+)`", text)
    assert len(ours) > 100
    for verb, option in ours:
        words = verb.split()
        if words[0] == "train":
            cls = task_module(words[1]).Config if words[1:] else TrainConfig
        else:
            row = cli.VERBS[verb]
            cls = named(f"{row.call.partition(':')[0]}:{row.options}")
        assert option.replace("-", "_") in kinds(cls), (verb, option)


# ---- and runs
def exchanged(words, world):
    "What is run instead: other names, and the words that make it tiny."
    line = " ".join(words)
    more = [w for start, said in SMALL.items() if line.startswith(start) for w in said.split()]
    if words[0] == "generate":
        more += FEW["--classes" in words].split()
    out = [NAMES.get(w, w) for w in words] + more
    if words[0] == "verify":
        out = [words[0], words[1], *out[2 : len(words)]]
    return [w.format(**world) if "{" in w else w for w in out]


@pytest.fixture(scope="module")
def world(tmp_path_factory, built):
    "Stand-ins in the layouts of what is fetched."
    home = tmp_path_factory.mktemp("printed")
    places = ["cats"] * 16 + [f"src/{split}/n0{k}" for split in ("train", "val") for k in (1, 2)] * 3
    for i, place in enumerate(places):
        (home / place).mkdir(parents=True, exist_ok=True)
        photo(i, (40, 36)).save(home / place / f"{place.replace('/', '_')}_{i:02}.JPEG")
    (home / "src/LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")
    faces = "--celeba 60 --hq 40 --hq-size 32 --identities 48 --min-side 40 --max-side 60 --workers 1"
    assert cli.run(["prepare", "photos", f"{home}/source", "--crops", "1", "--workers", "1"]) == 0
    assert cli.run(["prepare", "faces", f"{home}/drawn/faces", *faces.split()]) == 0
    own = [f"{home}/source", f"{home}/own", "--size", "32", "--workers", "1"]
    assert cli.run(["prepare", "unsplash", *own]) == 0
    parts = dict(
        model=tiny_models.thin_sd15,
        dino=tiny_models.tiny_dino,
        clip=tiny_models.tiny_clip,
        vae=tiny_models.tiny_vae,
        sd3=tiny_models.tiny_sd3,
    )
    return dict(home=home) | {k: built(make) for k, make in parts.items()}


def is_fine(words, some, capsys):
    "None, or what is wrong with what a command does."
    new = some[2:3] if some[0] in ("export", "generate") else []
    if some[0] in ("evaluate", "train"):
        new = some[some.index("--out") + 1 :][:1] if "--out" in some else []
    if some[0] == "train" and not new:
        preset = some[some.index("--preset") + 1] if "--preset" in some else "tiny"
        new = [f"runs/{some[1]}-{preset}"]
    for place in new:
        shutil.rmtree(place, ignore_errors=True)  # pages are read one at a time
    capsys.readouterr()
    try:
        code = cli.main(some)
    except Exception as e:
        code = repr(e)
    line = " ".join(words)
    said = capsys.readouterr().err
    later = next((v for k, v in LATER.items() if line.startswith(k) or f" {k}" in line), 0)
    fine = later in said if isinstance(later, str) else code == later
    return None if fine else (line, " ".join(some), code, said[-400:])


def test_printed_commands_run(world, monkeypatch, capsys):
    monkeypatch.chdir(world["home"])
    done, wrong = set(), []
    for page, words, own in printed():
        if is_pattern(words) or not (own or len(words) > 3):
            continue
        for line in BEFORE.get(" ".join(words[:2]), []):
            assert is_fine(line.split(), exchanged(line.split(), world), capsys) is None, line
        some = exchanged(words, world)
        if tuple(some) not in done:
            done.add(tuple(some))
            wrong += [(page, *w) for w in [is_fine(words, some, capsys)] if w]
    # what was trained without --vae is given one later, and draws
    assert cli.main(["export", "runs/photos", "out/whole", "--vae", str(world["vae"])]) == 0
    assert (world["home"] / "out/whole/vae").is_dir()
    assert not wrong, "\n\n".join("\n  ".join(map(str, w)) for w in wrong)


def test_what_is_trained_on_latents_can_be_drawn():
    trained = [w for _, w, _ in printed() if w[:4] == ["train", "flow_dit", "--preset", "full"]]
    assert len(trained) > 8 and not [w for w in trained if "--vae" not in w and "--dry-run" not in w]


RUN = {(w[1], w[3]) for _, w, _ in printed() if w[0] == "train" and w[2:3] == ["--preset"]}  # above
PRESETS = [(t, p) for t in TASKS for p in task_module(t).Config.presets if (t, p) not in RUN]


@pytest.mark.parametrize("task, preset", PRESETS)
def test_every_preset_runs_at_tiny_size(task, preset, world, monkeypatch, capsys):
    monkeypatch.chdir(world["home"])
    words = ["train", task, "--preset", preset, "--dry-run"]
    wrong = is_fine(words, exchanged(words, world), capsys)
    assert wrong is None, wrong
