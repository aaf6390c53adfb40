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
"""Qwen-Image, with its renormalized guidance."""

import torch
from rlr_utils import linear_guidance

from .base import to_images
from .flow import FlowModel, packed, unpacked


class QwenImage(FlowModel):
    """`QwenImagePipeline`; its conditions are "prompt_embeds" (B, L, D) and "prompt_embeds_mask" (B, L)."""

    pipeline_class = "QwenImagePipeline"
    name = "qwen-image"
    guidance_scale = 4.0
    longest_sequence = 1024
    scheduler_entries = ("use_dynamic_shifting", "shift_terminal")

    @classmethod
    def check(cls, pipeline):
        super().check(pipeline)
        for entry in ("latents_mean", "latents_std"):
            if len(pipeline.vae.config.get(entry) or ()) != pipeline.vae.config.z_dim:
                raise ValueError(f"the VAE has no {entry} of {pipeline.vae.config.z_dim} channels in its config.json")
        if pipeline.transformer.config.use_additional_t_cond:
            raise ValueError("the transformer takes another condition (use_additional_t_cond in its config.json)")

    @classmethod
    def text_widths(cls, pipeline):
        config = pipeline.text_encoder.config.get_text_config()
        return [("prompts", config.hidden_size, pipeline.transformer.config.joint_attention_dim)]

    def embed(self, prompts, device=None):
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device or self.network.device, max_sequence_length=self.max_sequence_length
        )
        mask = torch.ones(embeds.shape[:2], device=embeds.device) if mask is None else mask
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask.bool()}

    def embed_negative(self, prompt=None, device=None):
        # The pipeline guides with a negative prompt alone. The model's own examples give a space.
        return self.embed([" " if prompt is None else prompt], device)

    def call(self, network, x, timestep, conditions, static):
        embeds, (height, width) = conditions["prompt_embeds"], x.shape[-2:]
        prediction = network(
            hidden_states=packed(x.to(embeds.dtype)),
            timestep=timestep.expand(len(x)).to(embeds.dtype) / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=conditions["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpacked(prediction, height, width)

    @staticmethod
    def guide(negative, positive, scale):
        """Classifier-free guidance whose patches keep the norms of the positive prediction's."""
        guided, positive = packed(linear_guidance(negative, positive, scale)), packed(positive)
        guided = guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        return unpacked(guided, *negative.shape[-2:])

    def decode(self, latents, vae=None):
        if vae is not None:
            raise ValueError("the VAE of Qwen-Image can be replaced by no other")
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # The VAE is one of videos, and an image one frame.
        return to_images(
            vae.decode((latents * std + mean).unsqueeze(2).to(vae.dtype), return_dict=False)[0].squeeze(2)
        )

    def pipeline_arguments(self, size, num_steps, guidance_scale, negative_prompt=None, **options):
        negative_prompt = " " if negative_prompt is None else negative_prompt
        arguments = super().pipeline_arguments(size, num_steps, guidance_scale, negative_prompt, **options)
        arguments["true_cfg_scale"] = arguments.pop("guidance_scale")
        return arguments
