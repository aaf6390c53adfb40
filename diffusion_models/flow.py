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
"""What the flow-matching families share: a transformer that predicts epsilon - x_0 at levels (1 - sigma, sigma)."""

import copy
import math

import numpy as np
import torch.nn.functional as F
from rlr_utils import ddim_steps, flow_sde_steps

from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from .base import DiffusionModel, check_vocabularies
from .schedulers import make_flow_scheduler


class FlowModel(DiffusionModel):
    """What pipelines with a transformer and a `FlowMatchEulerDiscreteScheduler` share.

    The pipelines draw without noise, by Euler's method, which is the chain with eta 0. Training adds noise to its steps.
    Latents are (B, C, h, w) here also where the network takes a sequence of 2 x 2 patches, see `packed`.

    Attributes:
        native_sigmas: whether the pipeline leaves the levels to its scheduler, where others pass evenly spaced ones.
        max_sequence_length: tokens of a prompt that the last text encoder reads, as the pipeline's call takes it.
        longest_sequence: the largest that it takes.
        widest_shift: the pipeline's own `max_shift` of a scheduler whose configuration does not say it.
        patch: side of the patches that the transformer takes, in latents.
        has_chat: whether the pipeline writes prompts into the chat template of its tokenizer.
        takes_guidance: whether the transformer may take a guidance scale.
        takes_solvers: whether a multistep scheduler set to flow matching can be replaced, see `make_flow_scheduler`.
    """

    trained = "transformer"
    vae_in_half_precision = True
    sampling_options = ("eta", "noise", "final_noise", "sigmas")
    native_sigmas = False
    max_sequence_length = longest_sequence = 512
    widest_shift = 1.15
    patch = 2
    has_chat = False
    takes_guidance = False
    takes_solvers = True
    make_scheduler = staticmethod(make_flow_scheduler)

    # What a family defines

    @classmethod
    def latent_channels(cls, pipeline):
        """How many channels the latents have, as the transformer's configuration says."""
        return pipeline.transformer.config.in_channels // cls.patch**2

    @classmethod
    def text_widths(cls, pipeline):
        """[(what of the prompt, its width, the width that the transformer takes)]."""
        raise NotImplementedError

    # What they share

    @classmethod
    def check(cls, pipeline):
        check_vocabularies(pipeline)
        if cls.has_chat and pipeline.tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template, into which the pipeline writes prompts")
        vae, channels = pipeline.vae.config, cls.latent_channels(pipeline)
        in_vae = vae.get("latent_channels", vae.get("z_dim"))
        if in_vae != channels:
            raise ValueError(f"the VAE has latents of {in_vae} channels, the transformer of {channels}")
        for entry in ("scaling_factor", "shift_factor"):
            if entry in vae and vae[entry] is None:
                raise ValueError(f"the VAE has no {entry} in its config.json, which the pipeline needs")
        for what, width, wanted in cls.text_widths(pipeline):
            if width != wanted:
                raise ValueError(f"the transformer takes {what} of width {wanted}, and the text encoder gives {width}")
        cls.check_transformer(pipeline.transformer.config)
        if pipeline.scheduler.config.get("use_flow_sigmas") and not cls.takes_solvers:
            raise ValueError(
                "its scheduler's configuration has use_flow_sigmas, with which the pipeline would draw at other levels"
            )

    @classmethod
    def check_transformer(cls, config):
        """Raise ValueError for a transformer that takes what the chain does not give, or cannot run."""
        if config.get("guidance_embeds") and not cls.takes_guidance:
            raise ValueError(
                "the transformer takes a guidance scale (guidance_embeds in its config.json): not supported"
            )
        axes, width = config.get("axes_dims_rope"), config.get("attention_head_dim")
        if axes is not None and sum(axes) != width:
            raise ValueError(
                f"the transformer's axes_dims_rope add up to {sum(axes)}, and its heads have width {width}"
            )

    def latents_shape(self, batch_size, size):
        height, width = (side // self.pipeline.vae_scale_factor for side in size)
        return batch_size, self.latent_channels(self.pipeline), height, width

    @property
    def prompt_reader(self):
        return self.pipeline.tokenizer, self.max_sequence_length

    @property
    def default_size(self):
        return (self.pipeline.default_sample_size * self.pipeline.vae_scale_factor,) * 2

    @property
    def size_multiple(self):
        return self.patch * self.pipeline.vae_scale_factor

    def image_seq_len(self, size):
        """How many patches an image has."""
        return math.prod(side // self.size_multiple for side in size)

    def mu(self, config, num_steps, image_seq_len):
        """The shift of the levels that the pipeline passes to its scheduler, for images of so many patches."""
        return calculate_shift(
            image_seq_len,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", self.widest_shift),
        )

    def leaves_levels(self, sigmas):
        """Whether the scheduler chooses the levels; for one that replaces a multistep scheduler they are evenly spaced."""
        return self.native_sigmas and sigmas == "native" and "flow_shift" not in self.pipeline.scheduler.config

    def noise_schedule(self, num_steps, size=None, sigmas="native"):
        """The pipeline's scheduler, set to T steps as the pipeline sets it.

        Args:
            num_steps: T.
            size: as for `make_chain`.
            sigmas: "native", or "linspace" for levels that are evenly spaced before the scheduler shifts them.

        Raises:
            ValueError: if the scheduler has no levels for so few steps.
        """
        scheduler, given = copy.deepcopy(self.pipeline.scheduler), {}
        if scheduler.config.use_dynamic_shifting:
            given["mu"] = self.mu(scheduler.config, num_steps, self.image_seq_len(size))
        if self.leaves_levels(sigmas):
            scheduler.set_timesteps(num_steps, **given)
        else:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), **given)
        if not scheduler.sigmas.isfinite().all():  # as of one step, where the levels are stretched to a last one
            raise ValueError(f"the model's scheduler has no levels for {num_steps} steps: use more")
        return scheduler

    def make_chain(
        self,
        network,
        num_steps,
        size,
        *,
        guidance_scale=5.0,
        eta=1.0,
        noise="ddim",
        final_noise=0.0,
        sigmas="native",
        device="cpu",
    ):
        """As for every model, with

        Args:
            eta: of DDIM, or the noise level a of Flow-SDE.
            noise: "ddim" or "flow_sde", see `rlr_utils.ddim_steps` and `rlr_utils.flow_sde_steps`.
            final_noise: of DDIM.
            sigmas: as for `noise_schedule`.
        """
        scheduler = self.noise_schedule(num_steps, size, sigmas)
        levels = scheduler.sigmas.tolist()
        if noise == "ddim":
            steps = ddim_steps([(1 - s, s) for s in levels], "flow_prediction", eta, final_noise)
        else:
            steps = flow_sde_steps(levels, eta)
        return self.chain_of_steps(
            *(network, steps, scheduler.timesteps, size, guidance_scale, device),
            add_noise=lambda x_0, noise: (1 - levels[-2]) * x_0 + levels[-2] * noise,
        )

    def drawing_options(self, options):
        return {**options, "eta": 0.0}

    def scheduler_code(self, name):
        config = self.pipeline.scheduler.config
        return ("FlowMatchEulerDiscreteScheduler", {"shift": config.shift}) if "flow_shift" in config else None

    def pipeline_arguments(self, size, num_steps, *given, sigmas="native", **options):
        arguments = super().pipeline_arguments(size, num_steps, *given)
        if self.native_sigmas and not self.leaves_levels(sigmas):
            arguments["sigmas"] = [round(1 - i / num_steps, 12) for i in range(num_steps)]
        return {**arguments, "max_sequence_length": self.max_sequence_length}


def packed(latents):
    """(B, C, h, w) -> the 2 x 2 patches as a sequence (B, h w / 4, 4 C)."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def unpacked(patches, height, width):
    """(B, h w / 4, 4 C) -> (B, C, h, w)."""
    return F.pixel_shuffle(patches.mT.unflatten(2, (height // 2, width // 2)), 2)
