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
"""What the families with a U-Net share."""

import copy
from functools import partial

import torch
from rlr_utils import scheduler_steps

from .base import DiffusionModel, check_vocabularies, tokenizers
from .schedulers import SCHEDULERS, make_scheduler


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

    trained = "unet"
    added = None

    def __init__(self, pipeline):
        super().__init__(pipeline)
        for tokenizer, encoder in tokenizers(pipeline):
            # A tokenizer whose configuration does not say it takes any length, to which prompts could not be padded.
            tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)

    make_scheduler = staticmethod(make_scheduler)

    @classmethod
    def check(cls, pipeline):
        unet, vae = pipeline.unet.config, pipeline.vae.config
        for entry, needed in OTHER_INPUTS.items():
            if unet.get(entry) is not None:
                raise ValueError(f"the U-Net needs {needed} ({entry} in its config.json), which is not supported")
        if unet.get("attention_type", "default") != "default":  # as GLIGEN's, whose further layers would get no input
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

    def noise_schedule(self, num_steps, size=None):
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
        scheduler = self.noise_schedule(num_steps)
        timesteps = scheduler.timesteps.to(device)
        return self.chain_of_steps(
            *(network, scheduler_steps(scheduler, eta), timesteps, size, guidance_scale, device),
            add_noise=partial(_last_step_noised, scheduler, timesteps[-1:]),
            init_noise_sigma=scheduler.init_noise_sigma,
        )

    def scheduler_code(self, name):
        return SCHEDULERS[name or "ddim"]

    def pipeline_arguments(self, *given, eta=1.0, **options):
        return {**super().pipeline_arguments(*given, **options), "eta": eta}


def _check_text(pipeline):
    """Raise ValueError if tokenizers, text encoders and U-Net do not fit together."""
    check_vocabularies(pipeline)
    pairs, widths = tokenizers(pipeline), pipeline.unet.config.cross_attention_dim
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
