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
"""Stable Diffusion 1.x and 2.x: a U-Net under one CLIP text encoder, for noise and v prediction."""

from .unet import UNetModel, encode_prompt


class StableDiffusion(UNetModel):
    """`StableDiffusionPipeline`; its conditions are "prompt_embeds" (B, L, D)."""

    pipeline_class = "StableDiffusionPipeline"
    name = "stable-diffusion"
    components = {"safety_checker": None, "requires_safety_checker": False}
    vae_in_half_precision = True

    def embed(self, prompts, device=None):
        return {"prompt_embeds": encode_prompt(self.pipeline, prompts, device or self.network.device)[0]}

    def call(self, network, x, timestep, conditions, static):
        embeds = conditions["prompt_embeds"]
        return network(x.to(embeds.dtype), timestep, encoder_hidden_states=embeds).sample
