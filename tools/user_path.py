"""The way of a data set, as a user goes it: prepare, verify, scan, shards, verify, cache, train.

    python tools/user_path.py [SET …] [--small] [--keep FOLDER]

Each command is the real one in its own process, and is timed. At the end a training from the cache is
compared with one that encodes in each step: the VAE has random weights (the published one is not here), so
this is a test of equality and a measure of time, not of pictures. Sets: photos, faces, scenes, digits.
--small: fewer pictures, for the tests.
"""

import argparse, hashlib, json, os, subprocess, sys, tempfile, time
from pathlib import Path

SETS = {  # name: commands that make the folder "data"; {n} is replaced by a number of pictures
    "photos": ["prepare photos source --crops {crops}", "prepare unsplash source data --size 64"],
    "faces": [
        "prepare faces source --celeba {n} --hq {half}",
        "prepare celeba-hq source/CelebAMask-HQ data --size 64",
    ],
    "scenes": ["prepare scenes data --train {n} --val 20 --test 20"],
    "digits": [
        "prepare digits source --scale 4",
        "prepare imagenet source data --size 32 --per-class {class_}",
    ],
}
THEN = [
    "verify data/manifest.json data",
    "scan data --limit 0.05",
    "shards data tars --max-bytes 500000",
    "verify tars/manifest.json tars",
    "cache latents tars cache --model vae --size 32 --dtype fp32 --encode-batch 1 --device cpu --threads 1",
    "train flow_dit --data cache --out cached {train}",
    "train flow_dit --data tars --vae vae --image-size 32 --encode-batch 1 --out online {train}",
]
TRAIN = (
    "--preset tiny --max-steps {steps} --batch-size 16 --warmup-steps 10 --num-samples 0 "
    "--num-inference-steps 2 --log-every 10 --validate-every 0 --threads 1 --device cpu"
)
FULL, SMALL = (
    dict(n=2000, half=300, crops=8, class_=0, steps=100),
    dict(n=60, half=30, crops=1, class_=4, steps=6),
)


def vae(folder):
    "An AutoencoderKL with random weights: 4 channels, 4 pixels per latent."
    import sdcourse, torch  # noqa: F401  (sdcourse guards torchvision)
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
    ).save_pretrained(folder)


def weights(run):
    "The hash of a run's last weights."
    (path,) = Path(run).glob("checkpoints/step-*/model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def go(name, folder, numbers):
    "[(command, seconds)] for one set, in `folder`; a command that fails ends it."
    folder.mkdir(parents=True)
    vae(folder / "vae")
    rows = []
    for line in SETS[name] + THEN:
        words = line.format(train=TRAIN, **numbers).format(**numbers).split()
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "sdcourse.cli", *words],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        rows.append(
            (
                " ".join(words[: 2 if words[0] in ("prepare", "cache", "train") else 1]),
                time.perf_counter() - start,
            )
        )
        if done.returncode:
            said = done.stdout[-1000:] + done.stderr[-2000:]
            raise SystemExit(f"{name}: sdcourse {' '.join(words)}: exit code {done.returncode}\n{said}")
    compare(name, folder)
    return rows


def compare(name, folder):
    "The two trainings must be one."
    if weights(folder / "cached") != weights(folder / "online"):
        raise SystemExit(f"{name}: training from the cache and training from pictures gave other weights")


def main(argv=None):
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("sets", nargs="*", default=[])
    ask.add_argument("--small", action="store_true")
    ask.add_argument("--keep", default="")
    args = ask.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.sets or SETS:
            rows = go(name, Path(args.keep or scratch) / name, SMALL if args.small else FULL)
            pictures = json.loads((Path(args.keep or scratch) / name / "data/manifest.json").read_text())[
                "layouts"
            ]["prepared"]["files"]
            many = sum(f["path"].endswith((".png", ".jpg")) for f in pictures)
            seconds = sum(t for _, t in rows)
            print(f"{name}: {many} pictures, {seconds:.0f} s; weights equal bit by bit")
            print("  " + " · ".join(f"{what} {t:.1f} s" for what, t in rows), flush=True)


if __name__ == "__main__":
    main()
