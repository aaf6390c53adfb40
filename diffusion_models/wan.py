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
"""Wan 2.1 and 2.2, from text to video, with a decoder whose gradient takes little memory."""

import math

import torch

from diffusers import DPMSolverMultistepScheduler, ModelMixin, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

from .decoders import computed_again
from .flow import FlowModel
from .lora_files import SECOND
from .schedulers import make_flow_scheduler
from .video import VideoModel, to_videos


# {what it is called: the component that draws those steps}
EXPERTS = {"high_noise": "transformer", "low_noise": SECOND}
FIRST_ORDER = {"solver_order": 1, "algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}


class Wan(VideoModel, FlowModel):
    """`WanPipeline`; its condition is "prompt_embeds" (B, L, D), which is zero behind the end of a prompt.

    Wan 2.2 A14B has two transformers, see `Experts`, which both get a LoRA, or one of them: `train_only`. Of Wan 2.2 TI2V
    5B the network is told a timestep for each patch.

    Attributes:
        experts: `Experts`, or `None` for a model with one transformer.
        trained_experts: names of those that get a LoRA.
    """

    pipeline_class = "WanPipeline"
    name = "wan"
    native_sigmas = True
    sampling_options = (*FlowModel.sampling_options, "guidance_scale_2")

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.experts, self.trained_experts = None, ()
        if pipeline.transformer_2 is not None:
            boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
            self.experts = Experts(pipeline.transformer, pipeline.transformer_2, boundary)
            self.trained_experts = tuple(EXPERTS.values())

    # What a model must be

    @classmethod
    def latent_channels(cls, pipeline):
        return pipeline.transformer.config.in_channels

    @classmethod
    def text_widths(cls, pipeline):
        width = pipeline.text_encoder.config.d_model
        return [("prompts", width, one.config.text_dim) for one in transformers_of(pipeline)]

    @classmethod
    def check(cls, pipeline):
        if pipeline.transformer is None:
            raise ValueError("it has no transformer")
        if (pipeline.transformer_2 is None) != (pipeline.config.boundary_ratio is None):
            raise ValueError("of a transformer_2 and a boundary_ratio in its model_index.json it has only one")
        for transformer in transformers_of(pipeline):
            cls.check_transformer(transformer.config)
        super().check(pipeline)
        channels, others = (one.config.in_channels for one in (pipeline.transformer, transformers_of(pipeline)[-1]))
        if channels != others:
            raise ValueError(f"the transformer takes latents of {channels} channels, transformer_2 of {others}")
        check_vae(pipeline.vae)

    @classmethod
    def check_transformer(cls, config):
        super().check_transformer(config)
        for entry in ("image_dim", "added_kv_proj_dim"):
            if config.get(entry) is not None:
                raise ValueError(
                    f"the transformer takes an image ({entry} in its config.json), which is not supported"
                )
        if config.in_channels != (config.out_channels or config.in_channels):
            raise ValueError(
                f"the transformer takes {config.in_channels} channels and predicts {config.out_channels}: it is not one"
                " from text to video"
            )
        if list(config.patch_size) != [1, cls.patch, cls.patch]:
            raise ValueError(f"the transformer takes patches of {list(config.patch_size)}, not of [1, 2, 2]")

    # Sizes and levels

    @staticmethod
    def make_scheduler(name, config):
        """First-order DPM-Solver++, whose steps are the chain's, at the levels of the pipeline's own multistep scheduler.

        The pipeline can be given no levels, and `FlowMatchEulerDiscreteScheduler` would shift its own twice.
        """
        scheduler = make_flow_scheduler(name, config)
        if config["_class_name"] == "FlowMatchEulerDiscreteScheduler":
            return scheduler
        return DPMSolverMultistepScheduler.from_config(config, **FIRST_ORDER)

    def scheduler_code(self, name):
        config = self.pipeline.scheduler.config
        return ("DPMSolverMultistepScheduler", FIRST_ORDER) if "solver_order" in config else None

    @property
    def size_multiple(self):
        return math.lcm(16, super().size_multiple)  # of 16 the pipeline wants them in any case

    def leaves_levels(self, sigmas):
        return True

    def noise_schedule(self, num_steps, size=None, sigmas="native"):
        if sigmas != "native":
            raise ValueError(
                f"the levels {sigmas} are not supported: a WanPipeline draws at those of its scheduler alone"
            )
        return super().noise_schedule(num_steps, size, sigmas)

    # Prompts and network

    @property
    def network(self):
        return self.experts or self.pipeline.transformer

    @property
    def networks(self):
        if self.experts is None:
            return super().networks
        return {name: getattr(self.pipeline, name) for name in self.trained_experts}

    def train_only(self, part):
        """Give a LoRA to only one of two transformers.

        Args:
            part: a key of `EXPERTS`.

        Raises:
            ValueError: for a model with one transformer.
        """
        if self.experts is None:
            super().train_only(part)
        self.trained_experts = (EXPERTS[part],)

    def trained_steps(self, num_steps, size):
        if self.experts is None or len(self.trained_experts) == len(EXPERTS):
            return None
        is_first = self.experts.is_first(self.noise_schedule(num_steps, size).timesteps).tolist()
        wanted = self.trained in self.trained_experts
        return [num_steps - i for i in range(num_steps) if is_first[i] == wanted]

    def embed(self, prompts, device=None):
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device or self.network.device,
        )
        return {"prompt_embeds": embeds}

    def call(self, network, x, timestep, conditions, static):
        embeds, shape = conditions["prompt_embeds"], (len(x),)
        if self.pipeline.config.expand_timesteps:
            shape = len(x), x[0, 0].numel() // self.patch**2
        return network(x.to(embeds.dtype), timestep.expand(shape), embeds, return_dict=False)[0]

    def make_chain(self, network, num_steps, size, *, guidance_scale_2=None, **options):
        """As for every flow-matching model, with

        Args:
            guidance_scale_2: of transformer_2, by default as that of the transformer.

        Raises:
            ValueError: if it is given for a model without transformer_2.
        """
        chain = super().make_chain(network, num_steps, size, **options)
        if guidance_scale_2 is None:
            return chain
        if self.experts is None:
            raise ValueError("guidance_scale_2 is for models with a transformer_2, which this one has not")
        is_first = self.experts.is_first(chain.timesteps).tolist()
        pairs = zip(is_first, chain.guidance_scales)
        chain.guidance_scales = [scale if first else guidance_scale_2 for first, scale in pairs]
        return chain

    def pipeline_arguments(self, *given, guidance_scale_2=None, **options):
        second = {} if guidance_scale_2 is None else {"guidance_scale_2": guidance_scale_2}
        return {**super().pipeline_arguments(*given, **options), **second}

    # Decoding

    def chunk_frames(self, num_frames):
        return [1] + [self.temporal_factor] * ((num_frames - 1) // self.temporal_factor)

    def decode(self, latents, vae=None):
        if vae is not None:
            raise ValueError("the VAE of Wan can be replaced by no other")
        return to_videos(torch.cat(list(decoded_chunks(self.pipeline.vae, latents)), 2))

    def decode_chunk(self, latents, index):
        """The frames (B, n, 3, H, W) of a latent frame, for which those behind it are not decoded.

        Raises:
            ValueError: if the latents have no such frame.
        """
        if not 0 <= index < latents.shape[2]:
            raise ValueError(f"no latent frame {index} in latents of {latents.shape[2]} frames")
        *_, chunk = decoded_chunks(self.pipeline.vae, latents[:, :, : index + 1])
        return to_videos(chunk)


class Experts(ModelMixin):
    """The two transformers of Wan 2.2 A14B as one network, for the noisy steps and for those below a timestep.

    Attributes:
        boundary: the last timestep of `transformer`.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = WanTransformer3DModel._keep_in_fp32_modules
    _repeated_blocks = WanTransformer3DModel._repeated_blocks

    def __init__(self, transformer, transformer_2, boundary):
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    def forward(self, hidden_states, timestep, *args, **kwargs):
        """As of a transformer, which the first timestep chooses."""
        expert = self.transformer if self.is_first(timestep.flatten()[0]) else self.transformer_2
        return expert(hidden_states, timestep, *args, **kwargs)

    def is_first(self, timestep):
        """Whether the steps at these timesteps are of `transformer`."""
        return timestep >= self.boundary


def transformers_of(pipeline):
    """The transformers that a pipeline has, one or two."""
    return [one for one in (pipeline.transformer, pipeline.transformer_2) if one is not None]


def check_vae(vae):
    """Raise ValueError for a VAE whose configuration does not say its statistics, or its scale as its layers have it."""
    for entry in ("latents_mean", "latents_std"):
        if len(vae.config.get(entry) or ()) != vae.config.z_dim:
            raise ValueError(f"the VAE has no {entry} of {vae.config.z_dim} channels in its config.json")
    spatial = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    temporal = 2 ** sum(vae.config.temperal_downsample)
    for entry, factor in (("scale_factor_spatial", spatial), ("scale_factor_temporal", temporal)):
        if vae.config[entry] != factor:
            raise ValueError(
                f"the VAE has layers for a {entry} of {factor}, and its config.json says {vae.config[entry]}"
            )


def decoded_chunks(vae, latents):
    """Latents (B, C, f, h, w) -> what the VAE makes of each latent frame, (B, 3, n, H, W), before it clamps it to [-1, 1].

    The decoder remembers features of earlier frames. It gets them and gives them back at each latent frame, so that for the
    gradient every one can be computed again by itself. What is remembered is kept only between groups of about sqrt(f)
    frames, and within the one that is being computed again: frames are decoded three times in all.
    """
    latents = latents.to(vae.dtype)
    mean, std = (
        latents.new_tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = vae.post_quant_conv(latents * std + mean)
    memory = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
    for group in latents.split(math.isqrt(latents.shape[2] - 1) + 1, 2):
        chunks, *memory = computed_again(decoded_group, vae, group, *memory)
        yield from chunks


def decoded_group(vae, latents, *memory):
    """Latent frames (B, C, n, h, w) and what the decoder remembers -> the frames of each, and what it remembers then."""
    chunks = []
    for latent in latents.split(1, 2):
        frames, *memory = computed_again(decoded_frame, vae, latent, *memory)
        chunks.append(frames)
    return chunks, *memory


def decoded_frame(vae, latent, *memory):
    """A latent frame (B, C, 1, h, w) and what the decoder remembers -> its frames, and what it remembers then."""
    memory = list(memory)
    frames = vae.decoder(latent, feat_cache=memory, feat_idx=[0], first_chunk=memory[0] is None)
    return unpatchify(frames, vae.config.patch_size or 1), *memory
