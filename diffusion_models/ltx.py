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
"""LTX-Video 0.9: a flow in the latents of a VAE whose decoder sees the whole video at once."""

import math

import torch
from rlr_utils import draw_noise

from .flow import FlowModel
from .video import VideoModel, to_videos


# Of the decoders since 0.9.1, which remove the last of the noise themselves: the noise that the latents get, as their share
# in it, and the timestep that the decoder is told, in [0, 1]. Both are those of the model's own examples.
DECODE_NOISE_SCALE, DECODE_TIMESTEP = 0.025, 0.05


class LTX(VideoModel, FlowModel):
    """`LTXPipeline`; its conditions are "prompt_embeds" (B, L, D) and "prompt_attention_mask" (B, L)."""

    pipeline_class = "LTXPipeline"
    name = "ltx-video"
    guidance_scale = 3.0
    default_size = (512, 704, 161)
    max_sequence_length = 128
    patch = 1
    scheduler_entries = ("use_dynamic_shifting", "shift_terminal")
    takes_solvers = False
    fps = 25  # the pipeline's own frame rate

    @classmethod
    def latent_channels(cls, pipeline):
        return pipeline.transformer.config.in_channels

    @classmethod
    def text_widths(cls, pipeline):
        return [("prompts", pipeline.text_encoder.config.d_model, pipeline.transformer.config.caption_channels)]

    @classmethod
    def check_transformer(cls, config):
        super().check_transformer(config)
        if (config.patch_size, config.patch_size_t) != (1, 1):
            raise ValueError(
                f"the transformer takes patches of {config.patch_size_t} x {config.patch_size} x {config.patch_size}"
                " latents, to which the pipeline gives the positions of single latents"
            )

    @property
    def spatial_factor(self):
        return self.pipeline.vae_spatial_compression_ratio

    @property
    def temporal_factor(self):
        return self.pipeline.vae_temporal_compression_ratio

    @property
    def size_multiple(self):
        return math.lcm(32, self.spatial_factor)

    def embed(self, prompts, device=None):
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device or self.network.device,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def call(self, network, x, timestep, conditions, static):
        embeds, (length, height, width) = conditions["prompt_embeds"], x.shape[-3:]
        prediction = network(
            hidden_states=x.to(embeds.dtype).flatten(2).mT,
            encoder_hidden_states=embeds,
            timestep=timestep.expand(len(x)),
            encoder_attention_mask=conditions["prompt_attention_mask"],
            **{"num_frames": length, "height": height, "width": width},
            rope_interpolation_scale=(self.temporal_factor / self.fps, *[self.spatial_factor] * 2),
            return_dict=False,
        )[0]
        return prediction.mT.unflatten(2, (length, height, width))

    def decode(self, latents, vae=None):
        """As for every model. What noise a decoder asks for is the same in every video and in every call."""
        if vae is not None:
            raise ValueError("the VAE of LTX-Video can be replaced by no other")
        vae = self.pipeline.vae
        mean, std = (values.view(-1, 1, 1, 1).to(latents) for values in (vae.latents_mean, vae.latents_std))
        latents = latents * std / vae.config.scaling_factor + mean
        timestep = None
        if vae.config.timestep_conditioning:
            noise = draw_noise((1, *latents.shape[1:]), torch.Generator().manual_seed(0), like=latents)
            latents = (1 - DECODE_NOISE_SCALE) * latents + DECODE_NOISE_SCALE * noise
            timestep = torch.full((len(latents),), DECODE_TIMESTEP, dtype=vae.dtype, device=latents.device)
        # Some decoders draw more noise, from the global generator.
        with torch.random.fork_rng([latents.device] if latents.is_cuda else []):
            torch.manual_seed(0)
            return to_videos(vae.decode(latents.to(vae.dtype), timestep, return_dict=False)[0])

    def pipeline_arguments(self, *given, **options):
        arguments = super().pipeline_arguments(*given, **options)
        if self.pipeline.vae.config.timestep_conditioning:
            arguments |= {"decode_timestep": DECODE_TIMESTEP, "decode_noise_scale": DECODE_NOISE_SCALE}
        return arguments
