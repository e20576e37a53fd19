"""A diffusers pipeline written as one file in the layout of the original Stable Diffusion, to test what reads
such files.
"""

import re

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(name, layers, levels):
    "The original name of a UNet tensor."
    for ours, theirs in ENDS.items():
        if name.startswith(ours + "."):
            return name.replace(ours, theirs, 1)
    part, rest = name.split(".", 1)
    if part == "mid_block":
        kind, i, tail = rest.split(".", 2)
        place, tail = (
            (f"middle_block.{2 * int(i)}", RESNET[tail.rsplit(".", 1)[0]] + "." + tail.rsplit(".", 1)[1])
            if kind == "resnets"
            else ("middle_block.1", tail)
        )
        return f"{place}.{tail}"
    level, kind, i, tail = rest.split(".", 3)
    level, i, down = int(level), int(i), part == "down_blocks"
    if kind == "downsamplers":
        return f"input_blocks.{(layers + 1) * (level + 1)}.0.op.{tail.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * level + layers}.2.{tail}"
    block = (
        f"input_blocks.{(layers + 1) * level + i + 1}"
        if down
        else f"output_blocks.{(layers + 1) * level + i}"
    )
    if kind == "attentions":
        return f"{block}.1.{tail}"
    return f"{block}.0.{RESNET[tail.rsplit('.', 1)[0]]}.{tail.rsplit('.', 1)[1]}"


def vae_name(name, levels):
    "The original name of a VAE tensor."
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    if "attn_1" in name:
        for ours, theirs in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            name = name.replace(ours, theirs)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}.block.{m[2]}", name
    )
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def save_original(pipe, path):
    "Write `pipe` as one .safetensors file."
    unet, vae = pipe.unet.config, pipe.vae.config
    out = {
        f"model.diffusion_model.{unet_name(k, unet.layers_per_block, len(unet.block_out_channels))}": v
        for k, v in pipe.unet.state_dict().items()
    }
    for k, v in pipe.vae.state_dict().items():
        name = vae_name(k, len(vae.block_out_channels))
        if "attn_1" in name and name.endswith("weight") and v.ndim == 2:
            v = v[:, :, None, None]
        out[f"first_stage_model.{name}"] = v
    for k, v in pipe.text_encoder.state_dict().items():
        out[f"cond_stage_model.transformer.{k if k.startswith('text_model.') else 'text_model.' + k}"] = v
    save_file({k: v.contiguous() for k, v in out.items()}, path)
    return path
