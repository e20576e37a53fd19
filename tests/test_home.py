"""Which models are taken, and which are refused in one line; and the noise that they were trained with."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sdcourse import cli
from sdcourse.commands.generate import GenerateOptions, as_the_run_says, open_pipeline
from sdcourse.core import UserError
from sdcourse.engine.loop import train
from sdcourse.engine.order import Draws
from sdcourse.models import tiny_sd
from sdcourse.config import resolve
from sdcourse.models.home import KNOWN_LICENCES, licence_of, model_home, noise_of, weights_licence
from sdcourse.train import sd15
from sdcourse.train.__main__ import task_module
from test_sd15 import config, model, model2, same, scenes  # noqa: F401 - fixtures

SCHEDULER = "scheduler/scheduler_config.json"


def changed(folder, file, **over):
    "A copy of a JSON file of a model, with other entries."
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | over))
    return folder


def copied(model, tmp_path, name="sd"):
    return shutil.copytree(model, tmp_path / name)


def one_line(fn, words):
    with pytest.raises(UserError, match=words) as e:
        fn()
    assert "\n" not in str(e.value)
    return str(e.value)


def task(where, out="", **over):
    return sd15.Task(config(out, model=str(where), **over))


# ---- the noise of the base model


@pytest.fixture
def ending(model2, tmp_path):
    "A model of v whose schedule ends in pure noise, as its file says."
    return changed(copied(model2, tmp_path), SCHEDULER, rescale_betas_zero_snr=True)


def test_the_base_models_schedule_is_followed_everywhere(ending, tmp_path, scenes):
    from diffusers import DDIMScheduler

    base = DDIMScheduler.from_pretrained(ending / "scheduler")
    abar, prediction = task(ending).noise
    assert prediction == "v" and abar[-1] == 0 and base.alphas_cumprod[-1] < 1e-9
    torch.testing.assert_close(abar.float(), base.alphas_cumprod, atol=1e-5, rtol=1e-4)
    run = tmp_path / "run"
    one = task(ending, run, data=str(scenes / "data"), max_steps=1)
    assert one.build().objective.abar[-1] == 0  # what the loss sees
    assert torch.equal(one.scheduler().alphas_cumprod, base.alphas_cumprod)  # what samples see
    train(one)
    exported = DDIMScheduler.from_pretrained(run / "export" / "scheduler")
    assert torch.equal(exported.alphas_cumprod, base.alphas_cumprod)
    assert "ends in pure noise" in (run / "README.md").read_text()
    again = task(run / "export").noise  # fine-tuned once more
    assert torch.equal(again[0], abar) and again[1] == "v"


def test_our_own_ending_is_followed_by_the_next_training(model2, tmp_path, scenes):
    run = tmp_path / "run"
    how = dict(data=str(scenes / "data"), max_steps=1, zero_terminal_snr=True, prediction="v")
    train(task(model2, run, **how))
    abar, prediction = task(run / "export").noise
    assert abar[-1] == 0 and prediction == "v"


def test_pure_noise_and_a_guess_of_the_noise(model, tmp_path):
    odd = changed(copied(model, tmp_path), SCHEDULER, rescale_betas_zero_snr=True)
    one_line(task(odd).check, "--prediction eps: the schedule of .* ends in pure noise.*give --prediction v")


def test_a_sampler_that_does_not_know_the_ending_is_exchanged(model, tmp_path):
    "PNDM of SD 1.5 would ignore the entry without a word."
    odd = changed(copied(model, tmp_path), SCHEDULER, rescale_betas_zero_snr=True)
    found = task(odd, prediction="v").scheduler()
    assert type(found).__name__ == "DDIMScheduler" and found.alphas_cumprod[-1] < 1e-9
    assert found.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "is a flow"),
        (dict(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2 is not supported"),
        (dict(prediction_type="sample"), "prediction sample is not supported"),
        (dict(trained_betas=[0.1, 0.2]), "is not supported"),
        (dict(beta_start=0.5, beta_end=3.0), "makes no schedule"),
        (dict(beta_start=0.0, beta_end=0.0), "makes no schedule"),
        (dict(num_train_timesteps=0), "makes no schedule"),
        (dict(num_train_timesteps=1, rescale_betas_zero_snr=True), "makes no schedule"),
        (dict(beta_end="0.02"), "makes no schedule"),
        (dict(beta_end=None), "makes no schedule"),
    ],
)
def test_noise_that_is_not_known(over, words):
    one_line(lambda: noise_of(over), words)


def test_adapters_bring_the_scheduler_that_they_were_trained_with(model, tmp_path, scenes):
    pytest.importorskip("peft")
    from diffusers import DDIMScheduler
    from safetensors import safe_open

    common = dict(data=str(scenes / "data"), max_steps=1, lora_rank=2)
    train(task(model, tmp_path / "same", **common))
    assert not (tmp_path / "same/export/scheduler").exists()
    train(task(model, tmp_path / "other", **common, zero_terminal_snr=True, prediction="v"))
    found = DDIMScheduler.from_pretrained(tmp_path / "other/export/scheduler")
    assert found.config.prediction_type == "v_prediction" and found.alphas_cumprod[-1] < 1e-9
    card = (tmp_path / "other/README.md").read_text()
    assert "DDIMScheduler.from_pretrained('export', subfolder='scheduler')" in card
    with safe_open(tmp_path / "other/export/kohya.safetensors", "pt") as f:
        assert f.metadata()["ss_base_model_version"] == "sd_v1_v"
    pipe, _ = open_pipeline(model, GenerateOptions(lora=str(tmp_path / "other/export")), "cpu")
    assert torch.equal(pipe.scheduler.alphas_cumprod, found.alphas_cumprod)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe, _ = open_pipeline(model, GenerateOptions(lora=str(tmp_path / "same/export")), "cpu")
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"


def test_kohyas_header_names_the_base(model, model2, tmp_path, scenes):
    pytest.importorskip("peft")
    from safetensors import safe_open

    found = {}
    for name, where in (("one", model), ("two", model2)):
        train(task(where, tmp_path / name, data=str(scenes / "data"), max_steps=1, lora_rank=2))
        with safe_open(tmp_path / name / "export/kohya.safetensors", "pt") as f:
            found[name] = {k: v for k, v in f.metadata().items() if k.startswith(("ss_v", "ss_base"))}
    assert found == {
        "one": {"ss_base_model_version": "sd_v1", "ss_v2": "False", "ss_v_parameterization": "False"},
        "two": {"ss_base_model_version": "sd_v2_v", "ss_v2": "True", "ss_v_parameterization": "True"},
    }


def test_adapters_are_drawn_as_their_run_says(model, tmp_path, scenes):
    "Wherever their folder is taken: guidance, steps and size; and so are its checkpoints."
    pytest.importorskip("peft")
    how = dict(data=str(scenes / "data"), max_steps=1, lora_rank=2, guidance_scale=1.5)
    train(task(model, tmp_path / "run", **how))
    moved = shutil.copytree(tmp_path / "run/export", tmp_path / "moved")
    base = GenerateOptions(data="scenes")
    for source, over in (
        (model, dict(lora=str(moved))),
        (model, dict(lora=str(moved / "pytorch_lora_weights.safetensors"))),
        (tmp_path / "run", {}),
        (tmp_path / "run/checkpoints/step-00000001", {}),
    ):
        found, more = as_the_run_says(source, dataclasses.replace(base, **over))
        assert (found.guidance_scale, found.num_inference_steps, found.size, more) == (1.5, 2, 32, {})
        assert as_the_run_says(source, dataclasses.replace(base, **over, size=64))[0].size == 64


# ---- models that do not fit


@pytest.mark.parametrize(
    "file, over, words",
    [
        ("unet/config.json", dict(in_channels=9), "in_channels 9 and its vae 4.*inpainting"),
        ("unet/config.json", dict(in_channels=5), "in_channels 5 and its vae 4.*depth"),
        ("unet/config.json", dict(out_channels=8), "out_channels 8"),
        ("unet/config.json", dict(cross_attention_dim=96), "text of width 96 and its text_encoder gives 32"),
        ("unet/config.json", dict(addition_embed_type="text_time"), "addition_embed_type"),
        ("unet/config.json", dict(num_class_embeds=1000), "num_class_embeds"),
        ("unet/config.json", dict(_class_name="UNet2DModel"), "its unet is a UNet2DModel"),
        (
            "model_index.json",
            dict(text_encoder_2=["transformers", "CLIPTextModelWithProjection"]),
            "with text_encoder_2; sd15 trains Stable Diffusion 1.x and 2.x",
        ),
        ("vae/config.json", dict(_class_name="AutoencoderTiny"), "AutoencoderTiny, expected AutoencoderKL"),
        ("vae/config.json", dict(latent_channels=16), "in_channels 4 and its vae 16"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line(model, tmp_path, file, over, words):
    odd = changed(copied(model, tmp_path), file, **over)
    one_line(task(odd).check, words)


@pytest.mark.parametrize(
    "part", ["model_index", "unet/config", "vae/config", "text_encoder/config", SCHEDULER]
)
def test_a_config_without_names_is_one_line(model, tmp_path, part):
    odd = copied(model, tmp_path)
    (odd / f"{part.removesuffix('.json')}.json").write_text("[]")
    one_line(task(odd).check, "json: has no names and values; fetch the model again")


def test_sdxl_given_to_sd15_is_one_line(tmp_path):
    from tiny_models import tiny_sdxl

    one_line(task(tiny_sdxl(tmp_path)).check, "with text_encoder_2; sd15 trains")


def test_sd3_given_to_sd15_is_one_line(tmp_path):
    "Its parts have other names, and no fetching would bring a unet."
    index = dict(_class_name="StableDiffusion3Pipeline", transformer=["diffusers", "SD3Transformer2DModel"])
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    one_line(task(tmp_path).check, "is a StableDiffusion3Pipeline with transformer; sd15 trains")


def test_one_part_of_a_pipeline_is_one_line(model):
    one_line(task(model / "unet").check, "unet: no model_index.json; give the folder of a pipeline")


@pytest.mark.parametrize("suffix", [".ckpt", ".CKPT", ".pt", ".bin", ".pkl"])
def test_a_pickle_that_is_there(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n")
    said = one_line(lambda: model_home(str(path)), "is a pickle, which is never read here.*safetensors")
    assert str(path) in said and "licence" not in said


def test_any_other_file_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    one_line(lambda: model_home(str(tmp_path / "notes.txt")), "is a file; give the folder of a pipeline")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_before_the_training(model, tmp_path, scenes, part, value):
    odd = copied(model, tmp_path)
    (file,) = (odd / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(k for k, v in tensors.items() if v.ndim == 2)[-1]
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    out = tmp_path / "run"
    how = dict(data=str(scenes / "data"))
    said = one_line(lambda: train(task(odd, out, **how)), "is not finite in float32; use other weights")
    assert part in said and not (out / "checkpoints").exists()


def test_a_folder_of_half_precision_alone_trains(model, tmp_path, scenes):
    odd = copied(model, tmp_path)
    for file in odd.rglob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    run = tmp_path / "run"
    assert train(task(odd, run, data=str(scenes / "data"), max_steps=1)).step == 1
    found = load_file(run / "export/unet/diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in found.values()} == {torch.float32}


# ---- one file


@pytest.fixture
def one_file(model, tmp_path):
    from diffusers import StableDiffusionPipeline
    from sdcourse.models.single_file import save_original

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    return save_original(pipe, tmp_path / "one.safetensors")


def test_capitals_at_the_end_of_a_file(one_file, model):
    path = one_file.rename(one_file.with_name("UP.SAFETENSORS"))
    a, b = task(path, model_config=str(model)), task(model)
    a.check()
    assert same(a.build().state_dict(), b.build().state_dict())


@pytest.mark.parametrize(
    "begins, what",
    [
        ("first_stage_model.", "holds no VAE"),
        ("cond_stage_model.", "holds no text encoder"),
        ("model.diffusion_model.", "holds no UNet"),
        ("", "holds no Stable Diffusion"),
    ],
)
def test_a_file_without_one_of_its_parts(one_file, model, begins, what):
    kept = {k: v for k, v in load_file(one_file).items() if not k.startswith(begins)}
    save_file(kept or {"w": torch.zeros(1)}, one_file)
    said = one_line(task(one_file, model_config=str(model)).check, what)
    assert "give" in said and "…" not in said


def in_open_clip(name, tensors, heads):
    "The tensors of a text encoder in the layout of Stable Diffusion 2."
    found, rest = {}, {}
    for k, v in tensors.items():
        k = k.removeprefix("text_model.")
        if m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", k):
            rest.setdefault((m[1], m[3]), {})[m[2]] = v
            continue
        k = re.sub(r"^encoder\.layers", "transformer.resblocks", k).replace("self_attn", "attn")
        k = k.replace("layer_norm", "ln_").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        k = k.replace("final_ln_", "ln_final").replace("embeddings.token", "token")
        found[name + k.replace("embeddings.position_embedding.weight", "positional_embedding")] = v
    for (layer, kind), parts in rest.items():
        joined = torch.cat([parts[p] for p in "qkv"])
        found[f"{name}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return found


@pytest.mark.parametrize("kind", ["half", "average", "more", "open clip"])
def test_a_file_as_people_share_it(one_file, model, kind):
    "Halves are trained in float32; an average and other things are passed over; SD 2 has names of its own."
    plain = load_file(one_file)
    shared = dict(plain)
    if kind == "half":
        shared = {k: v.half() for k, v in plain.items()}
    elif kind == "average":
        network = {k.removeprefix("model."): v for k, v in plain.items() if k.startswith("model.")}
        shared |= {"model_ema." + k.replace(".", ""): v + 1 for k, v in network.items()}
    elif kind == "more":
        shared |= {
            "model_ema.decay": torch.ones(1),
            "betas": torch.ones(1000),
            "first_stage_model.loss.x": torch.ones(2),
        }
    else:
        begin = "cond_stage_model.transformer."
        text = {k.removeprefix(begin): v for k, v in plain.items() if k.startswith(begin)}
        shared = {k: v for k, v in plain.items() if not k.startswith(begin)}
        shared |= in_open_clip("cond_stage_model.model.", text, 2)
    save_file({k: v.contiguous() for k, v in shared.items()}, one_file)
    a, b = task(one_file, model_config=str(model), train_text=True), task(model, train_text=True)
    a.check()
    got, wanted = a.build().state_dict(), b.build().state_dict()
    if kind == "half":
        wanted = {k: v.half().float() for k, v in wanted.items()}
    assert same(
        {k: got[k] for k in wanted if k != "empty"}, {k: v for k, v in wanted.items() if k != "empty"}
    )
    assert {v.dtype for v in got.values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    "kind, words",
    [
        ("average", "holds no UNet"),
        ("prefix", "holds no Stable Diffusion"),
        ("empty", "holds no Stable Diffusion"),
        ("nothing", "is no safetensors file"),
    ],
)
def test_a_file_that_is_none_of_ours(one_file, model, kind, words):
    plain = load_file(one_file)
    found = dict(
        average={re.sub(r"^model\.", "model_ema.", k): v for k, v in plain.items()},
        prefix={"module." + k: v for k, v in plain.items()},
    )
    save_file(found.get(kind, {}), one_file)
    if kind == "nothing":
        one_file.write_bytes(b"")
    one_line(task(one_file, model_config=str(model)).check, words)


def test_a_file_that_is_cut_off(one_file, model):
    one_file.write_bytes(one_file.read_bytes()[:1000])
    one_line(task(one_file, model_config=str(model)).check, "is no safetensors file, or is cut off")


def test_a_file_with_a_weight_that_is_no_number(one_file, model):
    tensors = load_file(one_file)
    tensors["model.diffusion_model.out.2.weight"].view(-1)[0] = torch.nan
    save_file(tensors, one_file)
    one_line(task(one_file, model_config=str(model)).check, "unet.conv_out.weight is not finite")


# ---- licences


def licence_on(run):
    head = re.match(r"---\n(.*?)\n---", (run / "README.md").read_text(), re.S)[1]
    return yaml.safe_load(head)["license"]


def test_the_card_carries_the_licence_of_the_weights_and_of_the_data(model, tmp_path, scenes):
    base = copied(model, tmp_path)
    common = dict(data=str(scenes / "data"), max_steps=1)
    train(task(base, tmp_path / "a", **common))
    assert licence_on(tmp_path / "a") == "unknown"
    (base / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# model\n")
    train(task(base, tmp_path / "b", **common))
    assert licence_on(tmp_path / "b") == "creativeml-openrail-m"
    train(task(tmp_path / "b/export", tmp_path / "c", **common))  # and what is made of that
    assert licence_on(tmp_path / "c") == "creativeml-openrail-m"
    assert "licence of the data: " in (tmp_path / "c/README.md").read_text()


@pytest.mark.parametrize(
    "data, found",
    [
        (["Apache-2.0"], "apache-2.0"),
        (["none: random numbers"], "apache-2.0"),
        (["CC BY 4.0", "Apache-2.0"], "cc-by-4.0"),
        (["Apache-2.0", "several, one for each photograph"], "other"),
        (["CC BY 4.0", "CC BY-NC-SA 4.0"], "other"),
        (["", "Apache-2.0"], "unknown"),
    ],
)
def test_weights_of_ours_carry_the_licence_of_the_data(data, found):
    assert weights_licence(*data) == found


@pytest.mark.parametrize(
    "name, over, found, words",
    [
        ("nets", dict(world="digits"), "cc-by-4.0", "CC BY 4.0"),
        ("nets", dict(world="scenes", share=0.001), "apache-2.0", "Apache-2.0"),
        ("nets", dict(world="photos", share=0.001), "other", "several"),
        ("vae", dict(share=0.001), "other", "several"),
        ("contrast", dict(share=0.001), "other", "MIT"),
        ("flow_dit", dict(data="digits"), "cc-by-4.0", "CC BY 4.0"),
        ("flow_dit", dict(data="photos", vae="tiny-vae"), "other", "several"),
        ("flow_dit", dict(data="synthetic"), "apache-2.0", "none"),
        ("sd15", dict(data="scenes"), "apache-2.0", "Apache-2.0"),
        ("sd15", dict(data="photos"), "other", "several"),
    ],
)
def test_every_card_says_under_which_terms_its_model_is(name, over, found, words):
    "faults.md G: all said Apache, whatever the pictures were."
    module = task_module(name)
    card = module.Task(resolve(module.Config, overrides=over)).card()
    assert card["license"] == found and words in card["data"]


@pytest.mark.parametrize("name", KNOWN_LICENCES)
def test_published_families_are_known_by_name(name, tmp_path):
    assert "openrail" in licence_of(name + "-5", tmp_path)


# ---- what transformers 4 reads


def test_exports_are_in_the_layout_that_both_versions_of_transformers_read(model, tmp_path, scenes):
    from transformers import CLIPTextModel, CLIPTokenizer

    run = tmp_path / "run"
    train(task(model, run, data=str(scenes / "data"), max_steps=1, train_text=True))
    made = run / "export"
    assert cli.run(["export", str(run), str(tmp_path / "text"), "--part", "text_encoder"]) == 0
    for folder in (made / "text_encoder", tmp_path / "text"):
        names = load_file(folder / "model.safetensors").keys()
        assert names and all(k.startswith("text_model.") for k in names)
        text, info = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for k, v in text.state_dict().items():
            assert torch.equal(v, load_file(folder / "model.safetensors")["text_model." + k])
    words = json.loads((made / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    merges = (made / "tokenizer/merges.txt").read_text(encoding="utf-8").splitlines()
    whole = CLIPTokenizer.from_pretrained(made / "tokenizer")
    assert words == whole.get_vocab() and merges[0] == "#version: 0.2"
    slow = CLIPTokenizer.from_pretrained(model / "tokenizer")
    texts = ["a red ring on a blue field", "zwei Häuser", "", "🎈 3 balloons!"]
    assert whole(texts).input_ids == slow(texts).input_ids
    new = tiny_sd.make_pipeline(tmp_path / "new")
    assert all(k.startswith("text_model.") for k in load_file(new / "text_encoder/model.safetensors"))


# ---- any config


NUMBERS = st.one_of(
    st.integers(-2, 12),
    st.sampled_from([0.5, -0.5, 1e300]),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.lists(st.integers(0, 20), max_size=3),
)
ENTRIES = {
    "unet/config.json": (
        "in_channels out_channels cross_attention_dim sample_size block_out_channels layers_per_block "
        "attention_head_dim norm_num_groups down_block_types up_block_types mid_block_type act_fn "
        "transformer_layers_per_block class_embed_type num_class_embeds addition_embed_type "
        "encoder_hid_dim encoder_hid_dim_type time_cond_proj_dim _class_name new"
    ),
    "vae/config.json": "latent_channels scaling_factor shift_factor block_out_channels latents_mean _class_name",
    "text_encoder/config.json": "hidden_size d_model vocab_size num_hidden_layers",
    SCHEDULER: (
        "num_train_timesteps beta_start beta_end beta_schedule prediction_type trained_betas "
        "rescale_betas_zero_snr timestep_spacing steps_offset _class_name"
    ),
    "model_index.json": "scheduler unet text_encoder text_encoder_2 transformer _class_name",
}
ODD = st.one_of(
    *(
        st.tuples(
            st.just(file), st.dictionaries(st.sampled_from(names.split()), NUMBERS, min_size=1, max_size=2)
        )
        for file, names in ENTRIES.items()
    ),
    st.tuples(
        st.sampled_from(sorted(ENTRIES)),
        st.sampled_from(
            ["", "{", "[]", "null", "3", '{"a": NaN}', "[" * 9999, '{"a": 1, "a": 2}', "\0", "{}"]
        ),
    ),
    st.tuples(
        st.sampled_from(["unet", "vae", "scheduler", "tokenizer", "text_encoder", *ENTRIES]), st.none()
    ),
)


@pytest.fixture(scope="module")
def few(built):
    from tiny_models import tiny_sd15

    return built(tiny_sd15)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(odd=ODD)
def test_any_config_is_one_line_or_trains_a_step(few, scenes, tmp_path_factory, odd):
    file, what = odd
    place = tmp_path_factory.mktemp("odd") / "m"
    shutil.copytree(few, place, copy_function=os.link)
    path = place / file
    if what is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        text = json.dumps(json.loads(path.read_text()) | what) if isinstance(what, dict) else what
        path.unlink()
        path.write_text(text)
    one = task(place, data=str(scenes / "data"), from_scratch=True)
    try:
        one.check()
        trains_a_step(one)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 700
    finally:
        shutil.rmtree(place)


def trains_a_step(one):
    module = one.build()
    x0 = torch.zeros(2, one.latents.channels, one.latents.side, one.latents.side)
    captions = one.captions.tokens(["a cat", "a dog"])
    batch = {"x0": x0, "tokens": captions, "text_encoder.hidden": module.empty.expand(2, *module.empty.shape)}
    loss, _ = module(batch, Draws(0, 0, range(2), device=torch.device("cpu")))
    loss.sum().backward()
    one.pipeline(module)


# ---- a variant of the files, a revision, another VAE
@pytest.fixture(scope="module")
def twofold(model, tmp_path_factory):
    "A model with two kinds of files; those of fp16 are other numbers, and the VAE has them in shards."
    home = shutil.copytree(model, tmp_path_factory.mktemp("two") / "sd")
    for file in sorted(home.rglob("*.safetensors")):
        half = {k: (v + 0.25).half() for k, v in load_file(file).items()}
        stem = file.name.removesuffix(".safetensors")
        if file.parent.name != "vae":
            save_file(half, file.parent / f"{stem}.fp16.safetensors", dict(format="pt"))
            continue
        where = {}
        for n, names in enumerate((sorted(half)[::2], sorted(half)[1::2]), 1):
            part = f"{stem}.fp16-0000{n}-of-00002.safetensors"
            save_file({k: half[k] for k in names}, file.parent / part, dict(format="pt"))
            where |= dict.fromkeys(names, part)
        index = file.parent / f"{stem}.safetensors.index.fp16.json"
        index.write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return home


def test_a_variant_of_the_files_is_read_by_its_name(twofold, tmp_path):
    plain, half = (task(where, data="scenes", image_size=32) for where in (twofold, f"{twofold}:fp16"))
    for t in (plain, half):
        t.check()
    a, b = (t.build().state_dict() for t in (plain, half))
    assert all(torch.equal((a[k] + 0.25).half().float(), b[k]) for k in a if k.startswith("unet."))
    a, b = (t.autoencoder().state_dict() for t in (plain, half))
    assert all(torch.equal((a[k] + 0.25).half().float(), b[k]) for k in a)
    draw = GenerateOptions(prompts="x", device="cpu")
    pipe, _ = open_pipeline(f"{twofold}:fp16", draw, "cpu")  # no network, no words: diffusers reads it too
    assert torch.equal(next(pipe.unet.parameters()), next(half.unet().parameters()))
    one_line(
        lambda: task(f"{twofold}:bf16").home, r"sd:bf16: no weights are called \*.bf16.safetensors; leave"
    )


def test_a_part_without_the_variant_is_said(twofold, tmp_path, caplog):
    home = shutil.copytree(twofold, tmp_path / "sd")
    (home / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    assert model_home(f"{home}:fp16").is_dir()
    assert "unet/ has no such files, and its usual ones are taken" in caplog.text


def test_a_revision_is_read_from_the_cache_of_the_hub(twofold, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from sdcourse.models.files import local_folder

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--sd"
    for name, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / name).write_text(commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
    found = [local_folder(f"owner/sd{end}").name for end in ("", "@v2", "@main", "@" + "b" * 40)]
    assert found == ["a" * 40, "b" * 40, "a" * 40, "b" * 40]
    one_line(lambda: local_folder("owner/sd@v3"), "hf download owner/sd --revision v3$")


def test_another_vae_than_that_of_the_pipeline(model, twofold, tmp_path):
    other = tmp_path / "vae"
    other.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(twofold / "vae" / name, other)
    tensors = load_file(other / "diffusion_pytorch_model.safetensors")
    half = {k: v + 0.25 for k, v in tensors.items()}
    save_file(half, other / "diffusion_pytorch_model.safetensors", dict(format="pt"))
    own, changed_ = task(model), task(model, vae=str(other))
    changed_.check()
    assert own.built_on["unet"] == changed_.built_on["unet"] and own.built_on != changed_.built_on
    assert all(torch.equal(half[k], v) for k, v in changed_.autoencoder().state_dict().items())
    from sdcourse.models.files import weights_id

    assert changed_.latents.vae == changed_.home / "vae" and weights_id(other) == changed_.built_on["vae"]
    changed(tmp_path, "vae/config.json", latent_channels=8)
    one_line(
        lambda: task(model, vae=str(other)), "--vae .*: has 8 channels, and that of the model 4; give another"
    )
