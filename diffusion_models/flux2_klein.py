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
"""FLUX.2 klein, base and distilled."""

import torch
import torch.nn.functional as F

from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from .base import to_images
from .flow import FlowModel


class Flux2Klein(FlowModel):
    """`Flux2KleinPipeline`; its condition is "prompt_embeds" (B, L, D), three layers of a language model.

    Its latents (B, 4 C, h / 2, w / 2) are the 2 x 2 patches of the VAE's, normalized by the VAE's batch norm.
    """

    pipeline_class = "Flux2KleinPipeline"
    name = "flux2-klein"
    scheduler_entries = ("use_dynamic_shifting",)
    has_chat = True
    takes_solvers = False

    @classmethod
    def text_widths(cls, pipeline):
        config = pipeline.text_encoder.config
        return [("prompts", 3 * config.hidden_size, pipeline.transformer.config.joint_attention_dim)]

    @property
    def is_distilled(self):
        return self.pipeline.config.is_distilled

    @property
    def lora_layers(self):
        # A single block has one layer for all projections of its input, and one for the output.
        count = self.pipeline.transformer.config.num_single_layers
        outputs = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(count)]
        return ",".join(["to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", *outputs])

    @property
    def num_inference_steps(self):
        return 4 if self.is_distilled else 50

    @property
    def guidance_scale(self):
        return 1.0 if self.is_distilled else 4.0

    def embed(self, prompts, device=None):
        embeds, _ = self.pipeline.encode_prompt(
            prompts, device or self.network.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds}

    def embed_negative(self, prompt=None, device=None):
        if prompt is not None:
            raise ValueError(f"the pipeline of FLUX.2 klein takes no negative prompt, such as {prompt!r}")
        return None if self.is_distilled else self.embed([""], device)

    def latents_shape(self, batch_size, size):
        height, width = (side // self.pipeline.vae_scale_factor // 2 for side in size)
        return batch_size, self.pipeline.transformer.config.in_channels, height, width

    def mu(self, config, num_steps, image_seq_len):
        return compute_empirical_mu(image_seq_len, num_steps)

    def static(self, size, guidance_scale=1.0):
        height, width = self.latents_shape(1, size)[-2:]
        places = [torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1)]
        return {"img_ids": torch.cartesian_prod(*places)[None]}

    def call(self, network, x, timestep, conditions, static):
        embeds = conditions["prompt_embeds"]
        tokens = torch.arange(embeds.shape[1], device=embeds.device)
        prediction = network(
            hidden_states=x.to(embeds.dtype).flatten(2).mT,
            timestep=timestep.expand(len(x)).to(embeds.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=embeds,
            txt_ids=F.pad(tokens[:, None], (3, 0)).expand(len(x), -1, -1),
            img_ids=static["img_ids"].expand(len(x), -1, -1),
            return_dict=False,
        )[0]
        return prediction.mT.unflatten(2, x.shape[-2:])

    def decode(self, latents, vae=None):
        if vae is not None:
            raise ValueError("the VAE of FLUX.2 klein can be replaced by no other")
        norm, config = self.pipeline.vae.bn, self.pipeline.vae.config
        mean, variance = (value.to(latents).view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        latents = latents * (variance + config.batch_norm_eps).sqrt() + mean
        vae = self.pipeline.vae
        return to_images(vae.decode(F.pixel_shuffle(latents, 2).to(vae.dtype), return_dict=False)[0])
