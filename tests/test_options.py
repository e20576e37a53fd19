"""Every option of every task has an effect, or is refused: the table says where one has none."""

import pytest

from sdcourse import cli
from sdcourse.config import kinds, parse_args, resolve
from sdcourse.core import UserError
from sdcourse.train.__main__ import TASKS, task_module
from test_flow_dit import latents_folder
from test_sd15 import model, scenes  # noqa: F401 - fixtures
from test_sd3 import sd3_data, sd3_model  # noqa: F401 - fixtures

SGD = dict(optimizer="torch.optim.SGD")
BIAS = dict(timestep_bias="range", timestep_bias_multiplier=2.0)

# task: option: [(other options, a value that then has no effect, words of the refusal)]
IDLE = dict(
    sd15=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        timestep_bias=[({}, "later", "with --timestep-bias-multiplier 1")],
        timestep_bias_multiplier=[({}, 3.0, "without --timestep-bias")],
        timestep_bias_portion=[
            ({}, 0.5, "with --timestep-bias none"),
            (BIAS, 0.5, "with --timestep-bias range"),
        ],
        timestep_bias_begin=[({}, 100, "only with range")],
        timestep_bias_end=[
            ({}, 900, "only with range"),
            (BIAS | dict(timestep_bias="later"), 900, "only with range"),
        ],
        dream_detail_preservation=[({}, 2.0, "without --dream")],
        bucket_step=[({}, 8, "without --buckets")],
        bucket_ratio=[({}, 3.0, "without --buckets")],
        bucket_upscale=[({}, 2.0, "without --buckets")],
        lora_modules=[({}, ("to_q",), "without --lora-rank")],
        lora_alpha=[({}, 4.0, "need --lora-rank")],
        lora_text=[({}, True, "need --lora-rank")],
        lr_end=[({}, 1e-5, "--lr-schedule constant")],
        model_config=[({}, "x", "with --model")],
        num_samples=[(dict(data="{scenes}/data"), 50, "is no built-in world")],
        max_samples=[(dict(latents="{scenes}/latents"), 5, "of a larger part of it (--max-samples)")],
        image_column=[(dict(latents="{scenes}/latents"), "image", "where no picture is encoded")],
        crop=[(dict(latents="{scenes}/latents"), "random", "where no picture is encoded")],
        image_size=[
            (dict(latents="{scenes}/latents"), 64, "holds pictures of 32 pixels, and --image-size is 64")
        ],
    ),
    flow_dit=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        lr_end=[(dict(lr_schedule="constant"), 1e-5, "--lr-schedule constant")],
        density_mean=[
            (dict(density="uniform"), 0.5, "with --density uniform"),
            (dict(density="mode"), 0.5, "mode"),
        ],
        density_std=[(dict(density="cosmap"), 0.5, "with --density cosmap")],
        density_scale=[({}, 0.5, "only with mode")],
        guidance_interval=[(dict(guidance_scale=1.0), (0.1, 0.9), "with --guidance-scale 1")],
        latent=[({}, (4, 16), "only with synthetic")],
        num_samples=[(dict(data="{cache}"), 50, "is no built-in world")],
        image_size=[
            ({}, 64, "with --data digits"),
            (dict(data="{cache}"), 64, "where no picture is encoded"),
        ],
        max_samples=[
            ({}, 5, "with --data digits"),
            (dict(data="synthetic"), 5, "where no picture is encoded"),
        ],
        image_column=[({}, "image", "with --data digits")],
        crop=[
            ({}, "random", "with --data digits"),
            (dict(data="{cache}"), "adm", "where no picture is encoded"),
        ],
    ),
    sd3=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        lr_end=[({}, 1e-5, "--lr-schedule constant")],
        density_mean=[(dict(density="uniform"), 0.5, "with --density uniform")],
        density_std=[(dict(density="cosmap"), 0.5, "with --density cosmap")],
        density_scale=[({}, 0.5, "only with mode")],
        lora_modules=[({}, ("attn.to_q",), "without --lora-rank")],
        lora_blocks=[({}, ("0",), "without --lora-rank")],
        lora_alpha=[({}, 4.0, "needs --lora-rank")],
        base_precision=[({}, "bf16", "without --lora-rank")],
        num_samples=[(dict(data="{scenes}/data"), 50, "is no built-in world")],
        max_samples=[(dict(latents="{sd3}/latents"), 5, "of a larger part of it (--max-samples)")],
        image_column=[(dict(latents="{sd3}/latents"), "image", "where no picture is encoded")],
        crop=[(dict(latents="{sd3}/latents"), "random", "where no picture is encoded")],
        image_size=[
            (dict(latents="{sd3}/latents"), 32, "holds pictures of 16 pixels, and --image-size is 32")
        ],
    ),
    nets=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        lr_end=[(dict(lr_schedule="constant"), 1e-5, "--lr-schedule constant")],
        gradient_checkpointing=[({}, True, "networks are small")],
        attention=[({}, "math", "networks have none")],
    ),
    vae=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        lr_end=[(dict(lr_schedule="constant"), 1e-5, "--lr-schedule constant")],
        gradient_checkpointing=[({}, True, "network is small")],
        compile=[({}, True, "network is small")],
        **{
            name: [(dict(model="tiny-vae"), value, ", which has its own")]
            for name, value in dict(widths=(8, 8), layers=2, latent_channels=8).items()
        },
    ),
    contrast=dict(
        beta2=[(SGD, 0.9, "with --optimizer torch.optim.SGD")],
        lr_end=[(dict(lr_schedule="constant"), 1e-5, "--lr-schedule constant")],
        gradient_checkpointing=[({}, True, "networks are small")],
        compile=[({}, True, "networks are small")],
        **{
            name: [(dict(model="{encoders}"), value, ", which has its own")]
            for name, value in dict(width=64, layers=(1, 1), side=32, patch=4, words=9).items()
        },
    ),
)

for table in IDLE.values():
    table |= dict(
        beta1=[(SGD, 0.8, "with --optimizer torch.optim.SGD")],
        adam_eps=[(SGD, 1e-6, "with --optimizer torch.optim.SGD")],
        tf32=[(dict(device="cpu"), "on", "with --device cpu")],
        ema_cpu=[
            (dict(device="cpu"), True, "with --device cpu"),
            (dict(ema_decay=0.0), True, "with --ema-decay 0"),
        ],
        tracker_project=[({}, "mine", "with --tracker none")],
        tracker_name=[(dict(tracker="tensorboard"), "first", "with --tracker tensorboard")],
        lr_power=[(dict(lr_schedule="linear"), 2.0, "with --lr-schedule linear")],
        lr_cycles=[(dict(lr_schedule="cosine"), 3, "with --lr-schedule cosine")],
    )

# options that count in every setting
ENGINE = set(
    "out seed max_steps epochs max_seconds stop_before requeue_code hang_seconds batch_size micro_batch optimizer lr "
    "lr_schedule warmup_steps weight_decay clip ema_decay precision num_workers threads log_every "
    "validate_every checkpoint_every keep max_bad_steps resume force device tracker push_to_hub dry_run".split()
)
LATENTS = set("data weights flip encode_batch cond_drop guidance_scale num_inference_steps".split())
ALWAYS = dict(
    sd15=ENGINE
    | LATENTS
    | set(
        "attention compile gradient_checkpointing prediction min_snr_gamma debiased zero_terminal_snr noise_offset "
        "input_perturbation dream buckets lora_rank caption_column latents prompts train_text model "
        "vae from_scratch scale_lr channels_last validation_prompts".split()
    ),
    flow_dit=ENGINE
    | LATENTS
    | set(
        "attention compile gradient_checkpointing density density_shift loss_weight size position mlp qk_norm vae sampler".split()
    ),
    sd3=ENGINE
    | LATENTS
    | set(
        "attention compile gradient_checkpointing density density_shift loss_weight lora_rank caption_column latents "
        "prompts model vae t5 t5_length validation_prompts".split()
    ),
    nets=ENGINE | set("compile world widths depths patch share".split()),
    vae=ENGINE | set("attention model side beta share".split()),
    contrast=ENGINE | set("attention model kind share".split()),
)
ROWS = [(t, o, row) for t, table in IDLE.items() for o, rows in table.items() for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_every_option_stands_in_the_table(task):
    known = kinds(task_module(task).Config).keys()
    assert known == ALWAYS[task] | IDLE[task].keys()
    assert not ALWAYS[task] & IDLE[task].keys()


@pytest.fixture(scope="module")
def places(tmp_path_factory, scenes, sd3_data):
    from sdcourse.models.tiny_clip import make_contrast, save_contrast
    from sdcourse.models.tiny_sd import make_tokenizer

    words = make_tokenizer(["a red ring"])
    encoders = tmp_path_factory.mktemp("encoders")
    save_contrast(make_contrast("clip", words, width=32, layers=(1, 1)), words, encoders)
    cache = latents_folder(tmp_path_factory.mktemp("cache") / "z")
    return dict(scenes=scenes, cache=cache, encoders=encoders, sd3=sd3_data)


def checked(task, over, given=()):
    module = task_module(task)
    cfg = resolve(module.Config, overrides=over)
    cfg.given = frozenset(given)
    cfg.check()
    module.Task(cfg).check()


@pytest.mark.parametrize("task, option, row", ROWS, ids=[f"{t} {o} {i}" for i, (t, o, _) in enumerate(ROWS)])
def test_an_option_without_effect_is_refused(task, option, row, places, model, sd3_model):
    others, value, words = row
    others = {k: v.format(**places) if isinstance(v, str) else v for k, v in others.items()}
    if task == "sd15":
        others = dict(model=str(model), flip=False) | others
        if "latents" in others:
            others["data"] = f"{places['scenes']}/data"
    if task == "sd3":
        own = (
            dict(data=f"{places['sd3']}/data", image_size=16) if "latents" in others else dict(image_size=32)
        )
        others = dict(model=str(sd3_model), flip=False, caption_column="") | own | others
    checked(task, others)  # the setting itself is fine
    with pytest.raises(UserError) as e:
        checked(task, others | {option: value}, given=[option])
    said = str(e.value)
    assert "--" + option.replace("_", "-") in said and words in said and "\n" not in said


def test_a_preset_is_no_wish_and_the_command_line_is():
    module = task_module("flow_dit")  # its preset tiny has a beta2 of its own
    cfg, _ = parse_args(module.Config, ["--optimizer", "torch.optim.SGD"], "x")
    cfg.check()
    cfg, _ = parse_args(module.Config, ["--optimizer", "torch.optim.SGD", "--beta2", "0.99"], "x")
    with pytest.raises(UserError, match="--beta2 0.99: has no effect"):
        cfg.check()


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    words = ["train", "flow_dit", "--density", "uniform", "--density-mean", "1", "--out", str(tmp_path / "r")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("--density-mean 1.0: has no effect with --density uniform; leave it out")
    assert not (tmp_path / "r").exists()


# ---- shapes

LEAST = dict(num_inference_steps=0, num_samples=-5, image_size=0, seed=-1, batch_size=0, max_samples=-1)


@pytest.mark.parametrize(
    "task, over, words",
    [
        ("nets", dict(patch=0), "patch 0: must be greater than 0"),
        ("nets", dict(patch=-1), "patch -1: must be greater than 0"),
        ("nets", dict(widths=(0, 0)), "--widths 0,0: give a number of 1 or more per stage"),
        ("nets", dict(widths=()), "widths"),
        ("nets", dict(widths=(), depths=()), "--widths : give a number"),
        ("nets", dict(depths=(1, -2)), "--depths 1,-2: give"),
        ("vae", dict(layers=0), "layers 0: must be greater than 0"),
        ("vae", dict(layers=-1), "layers -1: must be greater than 0"),
        ("vae", dict(latent_channels=0), "latent.channels 0: must be greater than 0"),
        ("vae", dict(side=0), "side 0: must be greater than 0"),
        ("vae", dict(widths=(0, 8)), "--widths 0,8: give multiples of 8"),
        ("vae", dict(widths=(-8,)), "--widths -8: give multiples of 8"),
        ("vae", dict(widths=()), "--widths : give multiples of 8"),
        ("vae", dict(side=33), "--side 33: is no multiple of 4"),
        (
            "flow_dit",
            dict(data="synthetic", latent=(0, 8)),
            "--latent 0,8: give channels and side of 1 or more",
        ),
        ("flow_dit", dict(data="synthetic", latent=(4, -8)), "--latent 4,-8: give"),
        ("flow_dit", dict(data="synthetic", latent=(4, 100000)), "--latent 4,100000: would take .* GB"),
        (
            "flow_dit",
            dict(guidance_interval=(0.9, 0.1)),
            "--guidance-interval 0.9,0.1: give two noise levels",
        ),
        (
            "flow_dit",
            dict(data="synthetic", latent=(8, 8), vae="tiny-vae"),
            "decodes 4 channels, and .* has 8",
        ),
        ("flow_dit", dict(guidance_scale=-1.0), "--guidance-scale -1.0: must be at least 0"),
        ("sd15", dict(guidance_scale=-1.0), "--guidance-scale -1.0: must be at least 0"),
        ("flow_dit", dict(data=""), "--data : no such folder"),
        ("flow_dit", dict(data="/no/such"), "--data /no/such: no such folder"),
        ("sd15", dict(data=""), "--data: is empty; give a data folder"),
        ("sd15", dict(model=""), "--model '': no name; give a folder"),
        *(
            (t, dict(encode_batch=n), f"encode.batch {n}: must be")
            for t in ("sd15", "flow_dit")
            for n in (0, -1)
        ),
        *((t, {o: v}, f"{v}: must be") for t in ("sd15", "flow_dit") for o, v in LEAST.items()),
        *(("sd15", dict(buckets=True, bucket_step=n), f"bucket.step {n}: must be") for n in (0, -16)),
        ("sd15", dict(num_inference_steps=1001), "--num-inference-steps 1001: more than the 1000 steps"),
    ],
)
def test_a_bad_shape_is_one_line(task, over, words):
    with pytest.raises(UserError, match=words) as e:
        checked(task, over)
    assert "\n" not in str(e.value)
