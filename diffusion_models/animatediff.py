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
"""AnimateDiff: a U-Net of Stable Diffusion whose frames see each other through motion modules."""

import torch

from .decoders import computed_again
from .unet import UNetModel, encode_prompt
from .video import VideoModel, to_videos


class AnimateDiff(VideoModel, UNetModel):
    """`AnimateDiffPipeline`; its conditions are "prompt_embeds" (B, L, D)."""

    pipeline_class = "AnimateDiffPipeline"
    name = "animatediff"
    repeated_blocks = ("BasicTransformerBlock",)
    guidance_scale = 7.5
    fps = 8
    vae_in_half_precision = True
    temporal_factor = 1

    @classmethod
    def check(cls, pipeline):
        super().check(pipeline)
        if pipeline.motion_adapter is None:  # and a U-Net of images would get random motion modules
            raise ValueError("it has no motion_adapter")

    @staticmethod
    def latent_channels(pipeline):
        return pipeline.unet.config.in_channels

    @property
    def default_size(self):
        return *super(VideoModel, self).default_size, 16  # height and width as for images

    @property
    def spatial_factor(self):
        return self.pipeline.vae_scale_factor

    @property
    def size_multiple(self):
        return super(VideoModel, self).size_multiple

    def check_size(self, size):
        super().check_size(size)
        most = self.pipeline.unet.config.motion_max_seq_length
        if size[2] > most:
            raise ValueError(f"videos of {size[2]} frames: the motion modules take at most {most}")

    def embed(self, prompts, device=None):
        return {"prompt_embeds": encode_prompt(self.pipeline, prompts, device or self.network.device)[0]}

    def call(self, network, x, timestep, conditions, static):
        embeds = conditions["prompt_embeds"]
        by_frame = embeds.repeat_interleave(x.shape[2], dim=0)
        return network(x.to(embeds.dtype), timestep, encoder_hidden_states=by_frame).sample

    def decode(self, latents, vae=None):
        """As for every model, frame by frame, each of which the backward pass decodes again: the gradient takes little memory."""
        vae = vae or self.pipeline.vae
        latents = (latents / vae.config.scaling_factor).to(vae.dtype)
        frames = [computed_again(vae.decode, frame, return_dict=False)[0] for frame in latents.unbind(2)]
        return to_videos(torch.stack(frames, 2))
