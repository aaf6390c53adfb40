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

import math

import torch
from rlr_utils import DenoisingChain, draw_noise, linear_guidance


class DiffusionModel:
    """A diffusers pipeline as training sees it.

    A subclass says what differs from pipeline to pipeline. Conditions are dicts of tensors with the batch first, named as
    the pipeline names them in `callback_on_step_end`. A size is (height, width) in pixels, of videos (height, width, frames).

    Args:
        pipeline: of `pipeline_class`.

    Attributes:
        pipeline_class: name of the pipeline in diffusers.
        name: of the family, as the Hub tags its models.
        trained: name of the component that gets the LoRA.
        components: what the pipeline is loaded with instead of what its folder holds.
        optional: components that a folder may lack, beside those that the pipeline says.
        scheduler_entries: what the configuration of a scheduler in a folder must say, beside what all of its kind must.
        vae_in_half_precision: whether the VAE may run in half precision though its configuration asks for float32.
        num_inference_steps, guidance_scale, lora_layers: what the flags of these names are by default.
        sampling_options: arguments of `make_chain` beside the guidance scale that flags set.
        repeated_blocks: names of the classes of blocks that the network repeats, where diffusers does not say them.
        missing: the optional components that this pipeline lacks.
    """

    pipeline_class = None
    name = None
    trained = None
    components = {}
    optional = ()
    scheduler_entries = ()
    vae_in_half_precision = False
    num_inference_steps = 50
    guidance_scale = 5.0
    lora_layers = "to_k,to_q,to_v,to_out.0"
    sampling_options = ("eta",)
    repeated_blocks = ()

    def __init__(self, pipeline):
        self.pipeline = pipeline
        self.missing = [name for name in self.optional if getattr(pipeline, name) is None]

    # What a family defines

    @classmethod
    def check(cls, pipeline):
        """Raise ValueError for a pipeline whose components do not fit the family."""

    @staticmethod
    def make_scheduler(name, config):
        """The scheduler of the chain, from the configuration of the pipeline's own.

        Args:
            name: a key of `SCHEDULERS`, or `None` for the family's default.
            config: of a scheduler.

        Raises:
            ValueError: if the chain cannot use it.
        """
        raise NotImplementedError

    def embed(self, prompts, device=None):
        """The conditions {name: (B, ...)} of B prompts; the text encoders must be on `device`, by default the network's."""
        raise NotImplementedError

    def embed_negative(self, prompt=None, device=None):
        """The conditions {name: (1, ...)} of a negative prompt, or of none; `None` for a model without guidance.

        Raises:
            ValueError: for a prompt where the pipeline takes none.
        """
        return self.embed([prompt or ""], device)

    def static(self, size, guidance_scale=1.0):
        """Conditions that do not depend on the prompt, handed to `call` as they are."""
        return {}

    def latents_shape(self, batch_size, size):
        """Shape of the latents of a batch."""
        raise NotImplementedError

    def noise_schedule(self, num_steps, size=None):
        """The pipeline's scheduler, set to T steps.

        Raises:
            ValueError: if the model has no such steps.
        """
        raise NotImplementedError

    def make_chain(self, network, num_steps, size, *, guidance_scale=5.0, eta=1.0, device="cpu"):
        """The model's chain without prompts; `conditioned_on(conditions, negative)` gives it those of a batch.

        Args:
            network: `self.network`, or what wraps it.
            num_steps: T.
            size: of the images.
            guidance_scale: of classifier-free guidance, as the pipeline takes it.
            eta: of DDIM, from 0 for the deterministic chain up to 1 for the noise of DDPM.
            device: of the timesteps and the static conditions.

        Returns:
            `rlr_utils.DenoisingChain`

        Raises:
            ValueError: if there is no such chain.
        """
        raise NotImplementedError

    def call(self, network, x, timestep, conditions, static):
        """One forward pass of the network: latents (B, ...) -> prediction (B, ...)."""
        raise NotImplementedError

    def decode(self, latents, vae=None):
        """Latents (B, ...) -> images (B, 3, H, W) or videos (B, F, 3, H, W) in [0, 1], differentiable.

        Args:
            vae: another one of the same latents.
        """
        return decode_latents(vae or self.pipeline.vae, latents)

    def scheduler_code(self, name):
        """(class, {setting: value}) of a scheduler for the pipeline that draws as the chain does, or `None` for its own.

        Args:
            name: as for `make_scheduler`.
        """
        return None

    def drawing_options(self, options):
        """The arguments of `make_chain` with which the chain draws what the pipeline draws, from those of training."""
        return options

    def train_only(self, part):
        """Give a LoRA to only one of several networks.

        Raises:
            ValueError: if there is only one.
        """
        raise ValueError("the model has one network, which is trained")

    def trained_steps(self, num_steps, size):
        """Those of the steps 1..T, counted from the image, whose network gets a LoRA; `None` for all."""
        return None

    def pipeline_arguments(self, size, num_steps, guidance_scale, negative_prompt=None, **options):
        """The arguments of the pipeline's call with which it draws what the chain draws.

        Args:
            options: from `drawing_options`.
        """
        height, width = size
        given = {} if negative_prompt is None else {"negative_prompt": negative_prompt}
        return {
            **{**given, "height": height, "width": width},
            **{"num_inference_steps": num_steps, "guidance_scale": guidance_scale},
        }

    def chain_guidance(self, guidance_scale):
        """The scale of classifier-free guidance, off at 1, for the pipeline's own guidance scale."""
        return guidance_scale

    guide = staticmethod(linear_guidance)

    # What all families share

    def chain_of_steps(self, network, steps, timesteps, size, guidance_scale, device, **options):
        """The chain without prompts of `AffineStep`s and what the network is told at each; `options` are the chain's own."""
        static = {name: value.to(device) for name, value in self.static(size, guidance_scale).items()}
        return DenoisingChain(
            lambda x, timestep, conditions: self.call(network, x, timestep, conditions, static),
            steps,
            timesteps.to(device),
            {},
            guidance_scale=self.chain_guidance(guidance_scale),
            guide=self.guide,
            **options,
        )

    @property
    def network(self):
        """The component that gets the LoRA, or one made of several that get one each."""
        return getattr(self.pipeline, self.trained)

    @property
    def networks(self):
        """{name of a component: the component}, of all that get a LoRA, see `train_only`."""
        return {self.trained: self.network}

    @property
    def blocks(self):
        """The blocks that the network repeats, none part of another."""
        named = set(getattr(self.network, "_repeated_blocks", None) or self.repeated_blocks)
        # Sharding gives them classes that are derived from their own.
        return [module for module in self.network.modules() if named & {one.__name__ for one in type(module).__mro__}]

    @property
    def text_encoders(self):
        """The pipeline's text encoders."""
        names = [name for name in self.pipeline.components if name.startswith("text_encoder")]
        return [getattr(self.pipeline, name) for name in sorted(names) if getattr(self.pipeline, name) is not None]

    def free_text_encoders(self):
        """Take the text encoders out of the pipeline, which can embed no prompts from then on."""
        for name in self.pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self.pipeline, name, None)

    @property
    def prompt_reader(self):
        """(tokenizer, how many tokens of a prompt the text encoder reads)."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer.model_max_length

    @property
    def default_size(self):
        """The size that the model was trained on.

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

    @property
    def size_multiple(self):
        """What height and width must be multiples of, in pixels."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    def check_size(self, size):
        """Raise ValueError for a size that the model cannot draw."""
        height, width = size
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"images of {height} x {width} pixels: not multiples of {self.size_multiple}")

    def draw_latents(self, chain, batch_size, size, generators):
        """x_T (B, ...) of a chain, in float32, drawn as the pipeline draws it; a generator per image."""
        like = torch.empty(0, device=chain.timesteps.device)
        return chain.init_noise_sigma * draw_noise(self.latents_shape(batch_size, size), generators, like=like)


def tokenizers(pipeline):
    """Each tokenizer of a pipeline with its text encoder."""
    parts = pipeline.components
    names = [(f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in ("", "_2", "_3")]
    return [(parts[one], parts[other]) for one, other in names if parts.get(one) and parts.get(other)]


def check_vocabularies(pipeline):
    """Raise ValueError for a tokenizer that knows more tokens than its text encoder."""
    for tokenizer, encoder in tokenizers(pipeline):
        size = encoder.config.get_text_config().vocab_size
        if len(tokenizer) > size:
            raise ValueError(f"the tokenizer knows {len(tokenizer)} tokens, its text encoder only {size}")


def decode_latents(vae, latents):
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], differentiable; with the VAE's own statistics, if it has any."""
    latents = latents.to(vae.dtype)
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    else:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    return to_images(vae.decode(latents, return_dict=False)[0])


def to_images(decoded):
    """What a VAE gives, in [-1, 1] and a little beyond -> images in [0, 1], in float32."""
    return (decoded.float() / 2 + 0.5).clamp(0, 1)
