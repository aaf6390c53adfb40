# Copyright 2026 The RLR Team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The models whose memory is counted, at full size and without values."""

from typing import Any, Callable, NamedTuple, Optional

import torch
from bench_networks import SD14_UNET, SD14_VAE
from diffusion_models.cogvideox import CogVideoX
from diffusion_models.decoders import recompute_blocks
from diffusion_models.flux import Flux
from diffusion_models.ltx import LTX
from diffusion_models.qwen_image import QwenImage
from diffusion_models.stable_diffusion import StableDiffusion
from diffusion_models.stable_diffusion_3 import StableDiffusion3
from diffusion_models.stable_diffusion_xl import StableDiffusionXL
from diffusion_models.wan import Wan
from diffusion_models.z_image import ZImage
from memory import copy_lora
from operators import SD35_MEDIUM, SDXL_UNET, WAN_SMALL, add_run_lora, in_bf16

import diffusers


# The entries of the Hub's config.json files that are not the classes' defaults.
SD35_LARGE = {
    **{"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64, "caption_projection_dim": 2432},
    **{"pos_embed_max_size": 192, "qk_norm": "rms_norm"},
}
IMAGE_VAE = {**SD14_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
IMAGE_VAE |= {"scaling_factor": 1.5305, "shift_factor": 0.0609}
# For --quick.
TINY_WAN = {
    **{"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "text_dim": 32},
    **{"freq_dim": 16, "rope_max_seq_len": 32},
}
TINY_WAN_VAE = {"base_dim": 4, "num_res_blocks": 1}


class Part(NamedTuple):
    """A network: its class, and the entries of the Hub's config.json that are not the class's defaults."""

    make: Callable
    config: dict = {}


class CountedModel(NamedTuple):
    """A model to count.

    Attributes:
        name: what the table calls it.
        family: that trains it.
        network, vae: `Part`s.
        conditions: {name: shape} of a prompt.
        sizes: (height, width), or (height, width, frames).
        scheduler: one that its chain takes; memory does not depend on it.
        is_guided: whether guidance takes a negative prompt.
    """

    name: str
    family: Any
    network: Part
    vae: Part
    conditions: dict
    sizes: list
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    is_guided: bool = True

    def load(self):
        """The `DiffusionModel` with a new LoRA, as a training run has it on its device."""
        network, vae = in_bf16(self.network), in_bf16(self.vae)
        add_run_lora(network, self.family)
        copy_lora(network)
        recompute_blocks(vae.decoder)
        pipeline = getattr(diffusers, self.family.pipeline_class)
        absent = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        absent += ("safety_checker", "feature_extractor", "image_encoder")
        known = pipeline.__init__.__annotations__
        parts = {name: None for name in absent if name in known}
        if "requires_safety_checker" in known:
            parts["requires_safety_checker"] = False
        return self.family(pipeline(**{self.family.trained: network}, vae=vae, scheduler=self.scheduler, **parts))

    def conditioned(self, model, size, num_steps, is_split=False):
        """The chain of an image or video."""
        prompt = {
            name: torch.ones(shape, dtype=torch.bool if name.endswith("mask") else torch.bfloat16)
            for name, shape in self.conditions.items()
        }
        chain = model.make_chain(model.network, num_steps, size, guidance_scale=model.guidance_scale)
        chain.split_guidance = is_split
        return chain.conditioned_on(prompt, prompt if self.is_guided else None)


def counted_models(quick):
    """The `CountedModel`s of the table."""
    if quick:
        wan, vae = Part(diffusers.WanTransformer3DModel, TINY_WAN), Part(diffusers.AutoencoderKLWan, TINY_WAN_VAE)
        return [CountedModel("tiny", Wan, wan, vae, {"prompt_embeds": (1, 7, 32)}, [(32, 32, 9)])]
    return [*image_models(), *video_models()]


def image_models():
    """At the sizes that they were trained on."""
    sd_vae, vae = Part(diffusers.AutoencoderKL, SD14_VAE), Part(diffusers.AutoencoderKL, IMAGE_VAE)
    ddim, large = diffusers.DDIMScheduler(), [(1024, 1024)]
    sd3, unet = diffusers.SD3Transformer2DModel, diffusers.UNet2DConditionModel
    t5 = {"prompt_embeds": (1, 333, 4096), "pooled_prompt_embeds": (1, 2048)}
    flux = {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)}
    sdxl = {"prompt_embeds": (1, 77, 2048), "add_text_embeds": (1, 1280)}
    # Prompts of these models have the length that they have.
    qwen, z_image = ({"prompt_embeds": (1, 100, width), "prompt_embeds_mask": (1, 100)} for width in (3584, 2560))
    qwen_image, qwen_vae = Part(diffusers.QwenImageTransformer2DModel), Part(diffusers.AutoencoderKLQwenImage)
    return [
        CountedModel(
            *("SD 1.4", StableDiffusion, Part(unet, SD14_UNET), sd_vae, {"prompt_embeds": (1, 77, 768)}, [(512, 512)]),
            scheduler=ddim,
        ),
        CountedModel("SDXL", StableDiffusionXL, Part(unet, SDXL_UNET), sd_vae, sdxl, large, scheduler=ddim),
        CountedModel("SD 3.5 M", StableDiffusion3, Part(sd3, SD35_MEDIUM), vae, t5, large),
        CountedModel("SD 3.5 L", StableDiffusion3, Part(sd3, SD35_LARGE), vae, t5, large),
        CountedModel("Z-Image", ZImage, Part(diffusers.ZImageTransformer2DModel), vae, z_image, large),
        CountedModel(
            *("FLUX.1 dev", Flux, Part(diffusers.FluxTransformer2DModel, {"guidance_embeds": True}), vae, flux),
            *([(512, 512), (1024, 1024)],),
            is_guided=False,
        ),
        CountedModel("Qwen-Image", QwenImage, qwen_image, qwen_vae, qwen, [(1024, 1024), (1328, 1328)]),
    ]


def video_models():
    """At sizes that they were trained on."""
    wan, wan_vae, umt5 = diffusers.WanTransformer3DModel, Part(diffusers.AutoencoderKLWan), (1, 512, 4096)
    sizes = [(480, 832, 33), (480, 832, 81)]
    ltx = {"prompt_embeds": (1, 128, 4096), "prompt_attention_mask": (1, 128)}
    return [
        CountedModel("Wan 2.1 1.3B", Wan, Part(wan, WAN_SMALL), wan_vae, {"prompt_embeds": umt5}, sizes),
        CountedModel("Wan 2.1 14B", Wan, Part(wan), wan_vae, {"prompt_embeds": umt5}, sizes),
        CountedModel(
            *(
                "LTX-Video 0.9.0",
                LTX,
                Part(diffusers.LTXVideoTransformer3DModel),
                Part(diffusers.AutoencoderKLLTXVideo),
            ),
            *(ltx, [(480, 704, 97), (512, 704, 161)]),
        ),
        CountedModel(
            *("CogVideoX 2B", CogVideoX, Part(diffusers.CogVideoXTransformer3DModel)),
            *(Part(diffusers.AutoencoderKLCogVideoX), {"prompt_embeds": (1, 226, 4096)}, [(480, 720, 49)]),
            scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
        ),
    ]


def linear_bytes(network) -> tuple[int, Optional[int]]:
    """(bytes of the weights of linear layers, which quantization makes smaller, those of the largest layer)."""
    sizes = [
        m.weight.nbytes for m in network.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad
    ]
    return sum(sizes), max(sizes)
