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
"""The networks that benchmarks measure: the embedded bundle, and SD 1.4 at full size with random weights."""

import random
from typing import Any, NamedTuple, Optional

import torch
from accelerate import Accelerator
from bench_common import TINY_AESTHETIC, TINY_SD
from diffusion_models import load_model
from diffusion_models.adapters import add_lora
from diffusion_models.base import DiffusionModel
from diffusion_models.decoders import recompute_blocks
from diffusion_models.stable_diffusion import StableDiffusion
from reward_cost import cases as reward_cases
from reward_models import load_reward
from train_rlr_sd import parse_args

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


PROMPT = "a red seven"
SD14_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD14_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD14_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class Networks(NamedTuple):
    """What a training run has on its device.

    Attributes:
        model: `DiffusionModel`, whose U-Net has a new LoRA.
        unet: as rollout and sweep call it.
        reward: of images.
        embeds: (1, L, D), the embeddings of a prompt.
        decode_batch_size: images decoded at a time; `None` for all.
    """

    model: DiffusionModel
    unet: Any
    reward: torch.nn.Module
    embeds: torch.Tensor
    decode_batch_size: Optional[int]

    @property
    def vae(self):
        return self.model.pipeline.vae

    @property
    def trainable(self):
        return [p for p in self.model.network.parameters() if p.requires_grad]

    def chain(self, num_steps, batch_size, size):
        """The chain of a batch under the prompt, guided by the same embeddings, which takes as long as others."""
        chain = self.model.make_chain(self.unet, num_steps, size, device=self.embeds.device)
        return chain.conditioned_on(
            {"prompt_embeds": self.embeds.expand(batch_size, -1, -1)}, {"prompt_embeds": self.embeds}
        )


def runs_on_cpu(args):
    """Whether --device is the CPU, or there is no other."""
    return args.device == "cpu" or not torch.accelerator.is_available()


def load(args):
    """The `Networks` of --preset, --device, --mixed_precision and --gradient_checkpointing."""
    torch.manual_seed(0)
    random.seed(0)
    precision = args.mixed_precision or ("bf16" if args.preset == "sd14" else "no")
    accelerator = Accelerator(mixed_precision=precision, cpu=runs_on_cpu(args))
    if args.preset == "bundle":
        return bundle(accelerator, args.gradient_checkpointing)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[precision]
    return sd14(accelerator, args.gradient_checkpointing, dtype)


def bundle(accelerator, checkpointing):
    """The embedded pipeline and aesthetic reward."""
    device, model = accelerator.device, load_model(TINY_SD)
    embeds = model.embed([PROMPT])["prompt_embeds"].to(device)
    reward = load_reward("aesthetic", path=TINY_AESTHETIC, device=device)
    unet = _prepare(model, accelerator, checkpointing)
    return Networks(model, unet, reward, embeds, decode_batch_size=None)


def sd14(accelerator, checkpointing, dtype):
    """SD 1.4 and the ViT-L/14 aesthetic reward at full size, with random weights."""
    device = accelerator.device
    with device:
        unet, vae = UNet2DConditionModel(**SD14_UNET), AutoencoderKL(**SD14_VAE)
        reward = reward_cases(quick=False)["aesthetic"]().reward.eval().requires_grad_(False)
    reward.clip.text_model = reward.clip.text_projection = None
    for network in (unet, vae):
        network.requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
    components = {name: None for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")}
    pipeline = StableDiffusionPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(**SD14_SCHEDULER), requires_safety_checker=False, **components
    )
    embeds, model = torch.randn(1, 77, 768, device=device, dtype=dtype), StableDiffusion(pipeline)
    return Networks(model, _prepare(model, accelerator, checkpointing), reward, embeds, decode_batch_size=1)


def _prepare(model, accelerator, checkpointing):
    """Give the U-Net a LoRA and move the networks to the device, as a training run does; returns the U-Net."""
    args = parse_args([])
    add_lora(model, rank=args.rank, alpha=args.rank, layers=args.lora_layers.split(","))
    if checkpointing:
        model.network.enable_gradient_checkpointing()
    recompute_blocks(model.pipeline.vae.decoder)
    model.pipeline.vae.to(accelerator.device)
    return model.network.to(accelerator.device)
