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
"""Stable Diffusion XL (huggingface.co/papers/2307.01952): a U-Net under two text encoders and the size of the images."""

import torch

from .unet import UNetModel, encode_prompt


class StableDiffusionXL(UNetModel):
    """`StableDiffusionXLPipeline` with both text encoders.

    Its conditions are "prompt_embeds" (B, L, D) and the pooled "add_text_embeds" (B, D').
    """

    pipeline_class = "StableDiffusionXLPipeline"
    name = "stable-diffusion-xl"
    components = {"add_watermarker": False}
    added = "text_time"

    @classmethod
    def check(cls, pipeline):
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ValueError("it does not have both text encoders: use a base model of SDXL, not a refiner")
        super().check(pipeline)
        unet, pooled = pipeline.unet.config, pipeline.text_encoder_2.config.projection_dim
        # Six numbers: the original size, the crop and the target size, as `static` gives them. A refiner takes five.
        given = 6 * (unet.addition_time_embed_dim or 0) + pooled
        if unet.projection_class_embeddings_input_dim != given:
            raise ValueError(
                f"the U-Net reads {unet.projection_class_embeddings_input_dim} numbers of size and pooled prompt, and SDXL"
                f" has {given}: use a base model of SDXL"
            )

    def embed(self, prompts, device=None):
        embeds, pooled = encode_prompt(self.pipeline, prompts, device or self.network.device)
        return {"prompt_embeds": embeds, "add_text_embeds": pooled}

    def embed_negative(self, prompt=None, device=None):
        embeds = super().embed_negative(prompt, device)
        if prompt is not None or not self.pipeline.config.force_zeros_for_empty_prompt:
            return embeds
        return {name: torch.zeros_like(value) for name, value in embeds.items()}

    def static(self, size, guidance_scale=1.0):
        # As in the pipeline: original size, crop and target size of images that are not cropped.
        return {"time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)}

    def call(self, network, x, timestep, conditions, static):
        embeds, pooled = conditions["prompt_embeds"], conditions["add_text_embeds"]
        time_ids = static["time_ids"].to(embeds.dtype).expand(len(x), -1)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return network(x.to(embeds.dtype), timestep, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
