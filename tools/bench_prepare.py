"""What a second process brings to preparing:

    python tools/bench_prepare.py [--source imagenet|unsplash] [--pictures 300] [--size 512] [--workers 2]
        [--rounds 2]

The same pictures with one process and with several, in turn, so that a slow minute of the machine hits both;
each time it says how many cores others took meanwhile. Prints JSON.
"""

import argparse, json, os, resource, shutil, tempfile, time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from sdcourse.data.parallel import cores
from sdcourse.data.sets.imagenet import ImageNetOptions, prepare_imagenet
from sdcourse.data.sets.unsplash import Unsplash, prepare_unsplash
from sdcourse.engine.stop import StopFlag

DIFFERENT = 50  # pictures; the others are copies of them


def make_picture(rng, size):
    "Coloured clouds with a little grain."
    h, w = size * 3 // 2, size * 2
    few = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    clouds = few.resize((w, h), Image.Resampling.BICUBIC)
    grain = np.asarray(clouds).astype(np.int16) + rng.integers(-8, 9, (h, w, 1), dtype=np.int16)
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def make_source(folder, args):
    "JPEGs in one class folder, or beside a table."
    home = folder / "train/n0" if args.source == "imagenet" else folder
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(args.pictures):
        if i < DIFFERENT:
            make_picture(rng, args.size).save(home / f"{i}.jpg", quality=90)
        else:
            shutil.copyfile(home / f"{i % DIFFERENT}.jpg", home / f"{i}.jpg")
    if args.source == "unsplash":
        rows = "".join(f"p{i}\tfile:{i}.jpg\tphoto {i}\n" for i in range(args.pictures))
        (folder / "photos.tsv000").write_text(
            "photo_id\tphoto_image_url\tai_description\n" + rows, encoding="utf-8"
        )


def busy():
    "Seconds that all cores have worked, for anybody."
    times = psutil.cpu_times()._asdict()
    return sum(times.get(k, 0) for k in ("user", "nice", "system", "steal"))


def own():
    "Seconds that this process and its children have worked."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(source, out, args, workers):
    "Prepare once; (seconds, how many cores others took)."
    start, others = time.perf_counter(), busy() - own()
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
        if args.source == "imagenet":
            prepare_imagenet(source, out, ImageNetOptions(size=args.size, workers=workers))
        else:
            prepare_unsplash(source, out, Unsplash(size=args.size, workers=workers), flag=StopFlag())
    took = time.perf_counter() - start
    others = busy() - own() - others
    shutil.rmtree(out)
    return took, max(0, others) / took


def bench(args):
    "One process and several, in turn."
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "src", Path(folder) / "out"
        make_source(source, args)
        for _ in range(args.rounds):
            one, others_one = timed(source, out, args, 1)
            many, others_many = timed(source, out, args, args.workers)
            others = [round(others_one, 1), round(others_many, 1)]
            rounds.append(
                dict(one_process_s=round(one, 2), workers_s=round(many, 2), others_took_cores=others)
            )
    ratio = min(r["one_process_s"] for r in rounds) / min(r["workers_s"] for r in rounds)
    return vars(args) | dict(
        cores=cores(), rounds=rounds, ratio=round(ratio, 2), load=round(os.getloadavg()[0], 1)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", choices=("imagenet", "unsplash"), default="imagenet")
    for name, default in dict(pictures=300, size=512, workers=2, rounds=2).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(bench(parser.parse_args())))
