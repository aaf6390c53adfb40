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
"""The interface of a model family, and what all families share."""

import copy
import math
from functools import partial

import torch
from rlr_utils import DenoisingChain, draw_noise, linear_guidance, scheduler_steps


class DiffusionModel:
    """A diffusers pipeline as training sees it.

    A subclass says what differs from pipeline to pipeline. Conditions are dicts of tensors with the batch first, named as
    the pipeline names them in `callback_on_step_end`. A size is (height, width) in pixels.

    Args:
        pipeline: of `pipeline_class`.

    Attributes:
        pipeline_class: name of the pipeline in diffusers.
        name: of the family, as the Hub tags its models.
        trained: name of the component that gets the LoRA.
        components: what the pipeline is loaded with instead of what its folder holds.
        vae_in_half_precision: whether the VAE may run in half precision though its configuration asks for float32.
    """

    pipeline_class = None
    name = None
    trained = "unet"
    components = {}
    vae_in_half_precision = False

    def __init__(self, pipeline):
        self.pipeline = pipeline

    # What a family defines

    @classmethod
    def check(cls, pipeline):
        """Raise ValueError for a pipeline whose components do not fit the family."""

    def embed(self, prompts, device=None):
        """The conditions {name: (B, ...)} of B prompts; the text encoders must be on `device`, by default the network's."""
        raise NotImplementedError

    def embed_nothing(self, device=None):
        """The conditions {name: (1, ...)} of images without a negative prompt, if they are not those of an empty one."""
        return None

    def static(self, size):
        """Conditions that depend on the size alone, handed to `call` as they are."""
        return {}

    def latents_shape(self, batch_size, size):
        """Shape of the latents of a batch."""
        raise NotImplementedError

    def call(self, network, x, timestep, conditions, static):
        """One forward pass of the network: latents (B, ...) -> prediction (B, ...)."""
        raise NotImplementedError

    def decode(self, latents, vae=None):
        """Latents (B, ...) -> images (B, 3, H, W) in [0, 1], differentiable; with another `vae` of the same latents."""
        raise NotImplementedError

    guide = staticmethod(linear_guidance)

    # What all families share

    @property
    def network(self):
        """The component that gets the LoRA."""
        return getattr(self.pipeline, self.trained)

    @property
    def text_encoders(self):
        """The pipeline's text encoders."""
        names = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        return [getattr(self.pipeline, name) for name in sorted(names) if getattr(self.pipeline, name) is not None]

    @property
    def default_size(self):
        """(height, width) that the model was trained on, in pixels.

        Raises:
            ValueError: if the network's configuration does not say it.
        """
        size = self.network.config.sample_size
        if size is None:
            raise ValueError(
                f"the {self.trained}'s config.json has no sample_size: give the size, as with --resolution"
            )
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"the sample_size in the {self.trained}'s config.json is {size!r}, not one or two sides")
        height, width = sides
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def check_size(self, size):
        """Raise ValueError for a size that the model cannot draw."""
        multiple = math.lcm(8, self.pipeline.vae_scale_factor)
        if size[0] % multiple or size[1] % multiple:
            raise ValueError(f"images of {size[0]} x {size[1]} pixels: not multiples of {multiple}")

    def draw_latents(self, chain, batch_size, size, generators):
        """x_T (B, ...) of a chain, in float32, drawn as the pipeline draws it; a generator per image."""
        like = torch.empty(0, device=chain.timesteps.device)
        return chain.init_noise_sigma * draw_noise(self.latents_shape(batch_size, size), generators, like=like)

    def noise_schedule(self, num_steps):
        """The pipeline's scheduler, set to T steps.

        Raises:
            ValueError: if T steps reach beyond the timesteps that the model was trained on.
        """
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(num_steps)
        if scheduler.timesteps.max() >= scheduler.config.num_train_timesteps:
            raise ValueError(f"{num_steps} steps reach beyond the model's timesteps: use fewer")
        return scheduler

    def make_chain(self, network, num_steps, size, *, guidance_scale=5.0, eta=1.0, device="cpu"):
        """The model's chain without prompts; `conditioned_on(conditions, negative)` gives it those of a batch.

        Args:
            network: `self.network`, or what wraps it.
            num_steps: T.
            size: (height, width) in pixels.
            guidance_scale: of classifier-free guidance; off at 1.
            eta: of DDIM, from 0 for the deterministic chain up to 1 for the noise of DDPM.
            device: of the timesteps and the static conditions.

        Returns:
            `rlr_utils.DenoisingChain`

        Raises:
            ValueError: if the scheduler's steps are not Gaussian with an affine mean, see `rlr_utils.scheduler_steps`.
        """
        scheduler = self.noise_schedule(num_steps)
        timesteps = scheduler.timesteps.to(device)
        static = {name: value.to(device) for name, value in self.static(size).items()}
        return DenoisingChain(
            lambda x, timestep, conditions: self.call(network, x, timestep, conditions, static),
            scheduler_steps(scheduler, eta),
            timesteps,
            {},
            guidance_scale=guidance_scale,
            guide=self.guide,
            add_noise=partial(_last_step_noised, scheduler, timesteps[-1:]),
            init_noise_sigma=scheduler.init_noise_sigma,
        )


# Entries of a U-Net's configuration under which it takes more than latents, a timestep and prompts. The pipelines of the
# families here feed none of them, or, for the first, in another way than the chain.
OTHER_INPUTS = {
    "time_cond_proj_dim": "an embedding of the guidance scale, since its guidance was distilled",
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "encoder_hid_dim_type": "embeddings of another kind of encoder",
}


class UNetModel(DiffusionModel):
    """What pipelines with a U-Net and an AutoencoderKL share.

    Attributes:
        added: of the U-Net's configuration, the `addition_embed_type` that the family feeds.
    """

    added = None

    def __init__(self, pipeline):
        super().__init__(pipeline)
        for tokenizer, encoder in _tokenizers(pipeline):
            # A tokenizer whose configuration does not say it takes any length, to which prompts could not be padded.
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)

    @classmethod
    def check(cls, pipeline):
        unet, vae = pipeline.unet.config, pipeline.vae.config
        for entry, needed in OTHER_INPUTS.items():
            if unet[entry] is not None:
                raise ValueError(f"the U-Net needs {needed} ({entry} in its config.json), which is not supported")
        if unet.attention_type != "default":  # as GLIGEN's, whose further layers would get no input
            raise ValueError(f"the U-Net's attention_type is {unet.attention_type!r}, which is not supported")
        if unet.addition_embed_type != cls.added:
            raise ValueError(
                f"model_index.json says {cls.pipeline_class}, whose U-Net has the addition_embed_type {cls.added!r}, and this"
                f" one has {unet.addition_embed_type!r}"
            )
        if unet.in_channels != unet.out_channels:
            raise ValueError(
                f"the U-Net takes {unet.in_channels} channels and predicts {unet.out_channels}: not a text-to-image model"
            )
        if vae.latent_channels != unet.in_channels:
            raise ValueError(f"the VAE has latents of {vae.latent_channels} channels, the U-Net of {unet.in_channels}")
        _check_text(pipeline)

    def latents_shape(self, batch_size, size):
        height, width = (side // self.pipeline.vae_scale_factor for side in size)
        return batch_size, self.pipeline.unet.config.in_channels, height, width

    def decode(self, latents, vae=None):
        return decode_latents(vae or self.pipeline.vae, latents)


def _tokenizers(pipeline):
    """Each tokenizer of a Stable Diffusion pipeline with its text encoder."""
    parts = pipeline.components
    names = [(f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in ("", "_2")]
    return [(parts[one], parts[other]) for one, other in names if parts.get(one) and parts.get(other)]


def _check_text(pipeline):
    """Raise ValueError if tokenizers, text encoders and U-Net do not fit together."""
    pairs, widths = _tokenizers(pipeline), pipeline.unet.config.cross_attention_dim
    for tokenizer, encoder in pairs:
        if len(tokenizer) > encoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer knows {len(tokenizer)} tokens, its text encoder only {encoder.config.vocab_size}"
            )
    widths, given = {widths} if isinstance(widths, int) else set(widths), sum(e.config.hidden_size for _, e in pairs)
    if widths != {given}:
        wanted = " and ".join(map(str, sorted(widths)))
        raise ValueError(f"the U-Net reads embeddings of width {wanted}, and prompts are embedded in {given}")


def _last_step_noised(scheduler, timestep, x_0, noise):
    """x_1 of the scheduler's forward process, for its last timestep, (1,)."""
    return scheduler.add_noise(x_0, noise, timestep)


def encode_prompt(pipeline, prompts, device):
    """What the `encode_prompt` of a Stable Diffusion pipeline returns for the prompts, without negative prompts."""
    with torch.no_grad():
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        return pipeline.encode_prompt(prompts, device=device, **options)[::2]


def decode_latents(vae, latents):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], differentiable; with the VAE's own statistics, if it has any."""
    latents = latents.to(vae.dtype)
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        latents = latents / vae.config.scaling_factor
    else:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    images = vae.decode(latents, return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
