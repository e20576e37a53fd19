"""Did a redesign change a number?

    python tools/fingerprints.py OUT.json
    python tools/fingerprints.py OUT.json --against BEFORE.json

Trains, caches and draws by the commands that users type, and keeps one SHA-256 for each result: over names,
dtypes, shapes and bytes of all its tensors, or over the sizes and pixels of its pictures. Files may change
their headers, folders and names of modules may change; numbers may not. Only the same machine, libraries and
number of threads give the same bits, so both sides are recorded here. Two minutes on one thread.
"""

import argparse, hashlib, json, os, subprocess, sys, tempfile, time
from pathlib import Path

SD15 = "train sd15 --preset tiny --data data --latents latents --prompts prompts --flip --max-steps 30"
COMMANDS = {  # result: (command, folder that it leaves)
    "photographs": ("prepare photos source --crops 2", None),
    "data": ("prepare unsplash source data --size 32", None),
    "cache of latents": ("cache latents data latents --model tiny-sd15 --size 32", "latents"),
    "cache of prompts": ("cache prompts data prompts --model tiny-sd15", "prompts"),
    "train sd15": (f"{SD15} --out full", "full/export"),
    "train sd15, LoRA": (f"{SD15} --lora-rank 4 --out lora", "lora/export"),
    "train flow_dit": ("train flow_dit --preset tiny --max-steps 300 --out dit", "dit/export"),
    "train vae": ("train vae --preset tiny --max-steps 30 --out vae", "vae/export"),
    "8 pictures of sd15": (
        "generate full sd15 --data data --max-samples 8 --guidance-scale 2 --batch 4",
        "sd15",
    ),
    "8 pictures of flow_dit": ("generate dit digits --prompts digits.jsonl --batch 4", "digits"),
}


def eight_digits():
    "Every 45th held-out digit: its id and its class, a line each."
    from sdcourse.data.sets.digits import digits

    table = digits("test").tensors
    rows = [{"id": str(table["id"][i].item()), "label": table["label"][i].item()} for i in range(0, 360, 45)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def tensors(folder):
    "Lines that say all of every tensor below a folder, by file."
    from safetensors import safe_open

    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                t = file.get_tensor(name).contiguous()
                digest = hashlib.sha256(t.flatten().view(dtype=BYTES).numpy()).hexdigest()
                yield f"{path.relative_to(folder)} {name} {t.dtype} {list(t.shape)} {digest}"


def pixels(folder):
    "Lines that say all of every picture below a folder."
    from PIL import Image

    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            digest = hashlib.sha256(picture.tobytes()).hexdigest()
            yield f"{path.relative_to(folder)} {picture.mode} {picture.size} {digest}"


def main(argv=None):
    global BYTES
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("out")
    ask.add_argument("--against", default="")
    args = ask.parse_args(argv)
    from torch import uint8 as BYTES

    found, env = (
        {},
        os.environ
        | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        },
    )
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "digits.jsonl").write_text(eight_digits(), encoding="utf-8")
        for what, (command, left) in COMMANDS.items():
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "sdcourse.cli", *command.split()],
                cwd=scratch,
                env=env,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                said = done.stdout[-1000:] + done.stderr[-2000:]
                raise SystemExit(f"sdcourse {command}: exit code {done.returncode}\n{said}")
            if left:
                read = pixels if "pictures" in what else tensors
                lines = list(read(Path(scratch, left)))
                if not lines:
                    raise SystemExit(f"sdcourse {command}: left nothing to read in {left}")
                found[what] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
                kind = "pictures" if read is pixels else "tensors"
                seconds = time.perf_counter() - start
                print(f"{found[what][:16]}  {what}: {len(lines)} {kind}, {seconds:.0f} s", flush=True)
    Path(args.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.against:
        return 0
    before = json.loads(Path(args.against).read_text(encoding="utf-8"))
    other = [what for what in before.keys() | found.keys() if before.get(what) != found.get(what)]
    print(f"DIFFERENT: {', '.join(sorted(other))}" if other else f"all {len(found)} are equal")
    return int(bool(other))


if __name__ == "__main__":
    raise SystemExit(main())
