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
"""CogVideoX 2B, 5B and 1.5: a transformer trained for v prediction on a schedule of betas that ends in pure noise."""

import copy
import math

import torch
from rlr_utils import ddim_steps, draw_noise

from .base import DiffusionModel, check_vocabularies
from .decoders import computed_again
from .schedulers import check_noise_schedule
from .video import VideoModel, to_videos


class CogVideoX(VideoModel, DiffusionModel):
    """`CogVideoXPipeline`; its conditions are "prompt_embeds" (B, L, D).

    The pipeline draws without noise, by DDIM, which is the chain with eta 0. Training adds noise to its steps. The larger
    models come with DPM-Solver, which remembers earlier steps; DDIM replaces it.

    The decoder takes latent frames two at a time. It returns the frames that it is asked for only where the latent frames
    are odd in number. CogVideoX 1.5 has patches of two latent frames: it denoises one more, in front, which is not decoded.
    """

    pipeline_class = "CogVideoXPipeline"
    name = "cogvideox"
    repeated_blocks = ("CogVideoXBlock",)
    trained = "transformer"
    vae_in_half_precision = True
    guidance_scale = 6.0
    fps = 8
    max_sequence_length = 226
    sampling_options = ("eta", "final_noise")

    def __init__(self, pipeline):
        super().__init__(pipeline)
        config = pipeline.transformer.config
        if not config.use_rotary_positional_embeddings:
            # The transformer has positions for this many tokens, no more and no fewer.
            self.max_sequence_length = config.max_text_seq_length
        self.padding = 0
        if config.patch_size_t is not None:  # 1.5
            self.padding, self.fps = 1, 16

    @classmethod
    def check(cls, pipeline):
        check_vocabularies(pipeline)
        config, in_vae = pipeline.transformer.config, pipeline.vae.config.latent_channels
        if config.ofs_embed_dim is not None or config.use_learned_positional_embeddings:
            raise ValueError("the transformer is one of image to video, which is not supported")
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"the transformer takes {config.in_channels} channels and predicts {config.out_channels}, as one of image to"
                " video: not supported"
            )
        if in_vae != config.in_channels:
            raise ValueError(f"the VAE has latents of {in_vae} channels, the transformer of {config.in_channels}")
        if config.patch_size_t not in (None, 2):
            raise ValueError(f"the transformer takes patches of {config.patch_size_t} latent frames, not of 1 or 2")
        width = pipeline.text_encoder.config.d_model
        if width != config.text_embed_dim:
            raise ValueError(
                f"the transformer takes prompts of width {config.text_embed_dim}, and the text encoder gives {width}"
            )

    @staticmethod
    def make_scheduler(name, config):
        from diffusers import CogVideoXDDIMScheduler

        class_name = config.get("_class_name")
        if name not in (None, "ddim"):
            raise ValueError(f"the scheduler {name} is not one of CogVideoX, which has DDIM alone")
        if class_name not in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
            raise ValueError(
                f"its scheduler, {class_name}, is neither CogVideoXDDIMScheduler nor CogVideoXDPMScheduler"
            )
        check_noise_schedule(config)
        return CogVideoXDDIMScheduler.from_config(config)

    @staticmethod
    def latent_channels(pipeline):
        return pipeline.transformer.config.in_channels

    @property
    def prompt_reader(self):
        return self.pipeline.tokenizer, self.max_sequence_length

    @property
    def default_size(self):
        config = self.network.config
        if config.patch_size_t is not None:  # whose configuration says the largest size instead
            return 768, 1360, config.sample_frames
        height, width = (side * self.spatial_factor for side in (config.sample_height, config.sample_width))
        return height, width, config.sample_frames

    @property
    def size_multiple(self):
        return self.network.config.patch_size * self.spatial_factor

    def check_size(self, size):
        height, width, frames = size
        multiple, config = 2 * self.temporal_factor, self.network.config
        if frames < 1 or (frames - 1) % multiple:
            raise ValueError(f"videos of {frames} frames: not one and a multiple of {multiple}")
        super().check_size(size)
        largest = config.sample_height * self.spatial_factor, config.sample_width * self.spatial_factor
        if self.padding and (height > largest[0] or width > largest[1]):
            raise ValueError(
                f"videos of {height} x {width} pixels: the model has positions for {largest[0]} x {largest[1]}"
            )

    def latents_shape(self, batch_size, size):
        batch, channels, length, height, width = super().latents_shape(batch_size, size)
        return batch, channels, length + self.padding, height, width

    def draw_latents(self, chain, batch_size, size, generators):
        # The pipeline has the frames before the channels.
        batch, channels, length, height, width = self.latents_shape(batch_size, size)
        like = torch.empty(0, device=chain.timesteps.device)
        return draw_noise((batch, length, channels, height, width), generators, like=like).transpose(1, 2)

    def noise_schedule(self, num_steps, size=None):
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        return scheduler

    def make_chain(self, network, num_steps, size, *, guidance_scale=5.0, eta=1.0, final_noise=0.0, device="cpu"):
        """As for every model, with

        Args:
            final_noise: as of `rlr_utils.ddim_steps`.
        """
        scheduler = self.noise_schedule(num_steps)
        config, timesteps = scheduler.config, scheduler.timesteps
        stride = config.num_train_timesteps // num_steps

        def level(t):
            kept = scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod
            return math.sqrt(kept), math.sqrt(1 - kept)

        # One by one: a step ends where the scheduler says, which need not be quite where the next one begins.
        levels = [[level(t), level(t - stride)] for t in timesteps.tolist()]
        steps = [ddim_steps(pair, config.prediction_type, eta, final_noise)[0] for pair in levels]
        alpha, sigma = levels[-1][0]
        return self.chain_of_steps(
            *(network, steps, timesteps, size, guidance_scale, device),
            add_noise=lambda x_0, noise: alpha * x_0 + sigma * noise,
        )

    def embed(self, prompts, device=None):
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device or self.network.device,
        )
        return {"prompt_embeds": embeds}

    def static(self, size, guidance_scale=1.0):
        if not self.network.config.use_rotary_positional_embeddings:
            return {}
        height, width, _ = size
        length = self.latents_shape(1, size)[2]
        cos, sin = self.pipeline._prepare_rotary_positional_embeddings(height, width, length, torch.device("cpu"))
        return {"cos": cos, "sin": sin}

    def call(self, network, x, timestep, conditions, static):
        embeds = conditions["prompt_embeds"]
        return network(
            hidden_states=x.to(embeds.dtype).transpose(1, 2),
            encoder_hidden_states=embeds,
            timestep=timestep.expand(len(x)),
            image_rotary_emb=(static["cos"], static["sin"]) if static else None,
            return_dict=False,
        )[0].transpose(1, 2)

    def decode(self, latents, vae=None):
        if vae is not None:
            raise ValueError("the VAE of CogVideoX can be replaced by no other")
        vae = self.pipeline.vae
        latents = (latents[:, :, self.padding :] / vae.config.scaling_factor).to(vae.dtype)
        pairs, length = latents.shape[2] // 2, latents.shape[2]
        lengths = [2] * pairs if length % 2 == 0 else [3] + [2] * (pairs - 1) if pairs else [1]
        pieces, memory = [], None
        for piece in latents.split(lengths, 2):
            frames, memory = computed_again(decoded_piece, vae, piece, memory)
            pieces.append(frames)
        return to_videos(torch.cat(pieces, 2))

    def scheduler_code(self, name):
        return "CogVideoXDDIMScheduler", {}

    def drawing_options(self, options):
        return {**options, "eta": 0.0}

    def pipeline_arguments(self, *given, **options):
        return {**super().pipeline_arguments(*given), "max_sequence_length": self.max_sequence_length}


def decoded_piece(vae, latents, memory):
    """Two or three latent frames and what the decoder remembers of those before -> their frames, and what it remembers then."""
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    return vae.decoder(latents, conv_cache=memory)
