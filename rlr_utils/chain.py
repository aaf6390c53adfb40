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
"""The denoising chain of a Stable Diffusion or SDXL pipeline, as the rollout and the sweep see it.

A chain is anything with three members:

    chain.num_steps -> int         T, the number of steps
    chain.sigma(k) -> float        standard deviation of the noise that step k injects; k = T runs first, k = 1 last
    chain.mean(k, x) -> Tensor     mu_k(x_k), differentiable in x and in the trainable parameters

so that one step is x_{k-1} = mu_k(x_k) + sigma_k z_k with z_k ~ N(0, I).
"""

import copy
import inspect
import math
from typing import NamedTuple

import torch

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor


# {name: class and what its configuration must say}. Configurations of PNDM, SD 1.4's default, do not say clip_sample, and
# the default of DDIM and DDPM would clip the latents; DPM-Solver of higher order remembers earlier steps.
SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpm_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
}


def make_scheduler(name, config):
    """The scheduler of a key of `SCHEDULERS` from the configuration of another one."""
    scheduler_class, settings = SCHEDULERS[name]
    return scheduler_class.from_config(config, **settings)


class DenoisingStep(NamedTuple):
    """What a scheduler does in one step, for a prediction e that the U-Net makes of `input_scale` x:

    x_{k-1} = x_from_x x + x_from_e e + sigma z,        x0_hat = x0_from_x x + x0_from_e e
    """

    x_from_x: float
    x_from_e: float
    sigma: float
    x0_from_x: float
    x0_from_e: float
    input_scale: float


def denoising_steps(scheduler, eta):
    """The `DenoisingStep` of each of a scheduler's timesteps, in their order.

    The scheduler itself is asked: it takes its steps for a few numbers whose answers give the coefficients away, and for
    others that they must foretell. So nothing of it is written again, and one that remembers earlier steps, clips its
    predictions or uses up its noise otherwise is found out.

    Args:
        scheduler: with `set_timesteps` already called; it is left as it is.
        eta: for schedulers whose `step` takes it.

    Raises:
        ValueError: for a scheduler whose steps are not of this form, and for one that is not finite at some step, such as
            noise prediction where the schedule starts in pure noise: it divides by an alpha of zero. So does DDIM there
            with eta = 1 for some numbers of steps, by rounding.
    """
    name, count = type(scheduler).__name__, len(scheduler.timesteps)
    asked = copy.deepcopy(scheduler)
    asked.set_timesteps(count)  # which forgets the steps taken so far
    options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    numbers, steps = torch.Generator().manual_seed(0), []
    for i, timestep in enumerate(asked.timesteps):
        x, e = torch.zeros(2, 4, 1, 1, 1)
        x[0] = e[1] = 1.0
        x[3], e[3] = torch.randn(2, generator=numbers)
        try:
            input_scale = asked.scale_model_input(torch.ones(1), timestep).item()
            z = randn_tensor(x.shape, torch.Generator().manual_seed(i))
            generator = torch.Generator().manual_seed(i)
            results = asked.step(e, timestep, x, generator=generator, return_dict=False, **options)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"{name} cannot be used here: {error}") from error
        # DPM-Solver keeps its predicted x_0 to itself.
        x0 = results[1] if len(results) > 1 else asked.model_outputs[-1]
        sigma = results[0][2] / z[2]
        mean = results[0] - sigma * z
        step = DenoisingStep(*(v.item() for v in (mean[0], mean[1], sigma, x0[0], x0[1])), input_scale)
        where = f"{name}, prediction_type {scheduler.config.prediction_type!r}, step {count - i} from the end (timestep {timestep.item():g})"
        if not all(map(math.isfinite, step)):
            raise ValueError(
                f"{where}: the schedule degenerates, the step is not finite; another eta or number of steps may do"
            )
        if abs(step.sigma) < 1e-6:  # what DDPM keeps its variance above is nothing that float32 could add to latents
            step = step._replace(sigma=0.0)
        for found, foretold in (
            (mean[3], step.x_from_x * x[3] + step.x_from_e * e[3]),
            (x0[3], step.x0_from_x * x[3] + step.x0_from_e * e[3]),
        ):
            if not torch.allclose(found, foretold, rtol=1e-3, atol=1e-3):
                raise ValueError(f"{where}: no Gaussian step whose mean is affine in latents and prediction")
        steps.append(step)
    return steps


class StableDiffusionChain:
    r"""The chain that a pipeline's U-Net and scheduler define under classifier-free guidance.

    mu_k and sigma_k are the scheduler's own, see `denoising_steps`: DDIM (huggingface.co/papers/2010.02502), DDPM
    (huggingface.co/papers/2006.11239), Euler ancestral, the SDE form of DPM-Solver++ of first order
    (huggingface.co/papers/2211.01095), or any other whose steps are Gaussian with an affine mean, for noise, v and sample
    prediction. The prediction is guided, e = e_uncond + s (e_cond - e_uncond) (huggingface.co/papers/2207.12598), and so
    is the mean: the gradient flows through both halves.

    Args:
        unet: predicts from (x, timestep, encoder_hidden_states=..., added_cond_kwargs=...) and returns an object with
            `.sample`; what is added is `None` but for SDXL (huggingface.co/papers/2307.01952).
        scheduler: with `set_timesteps` already called.
        prompt_embeds: (B, L, D) for the whole chain, or (T, B, L, D) for one prompt per step, the first executed first.
            The U-Net runs in the dtype of these embeddings, the latents keep their own.
        negative_prompt_embeds: (B, L, D), (1, L, D) for the same in all pictures, or `None` for no guidance.
        pooled_prompt_embeds: of SDXL, (B, D') or (T, B, D'), else `None`.
        negative_pooled_prompt_embeds: of SDXL, (B, D') or (1, D').
        time_ids: of SDXL, (1, 6): original size, crop and target size of all pictures.
        guidance_scale: s; guidance is off at s <= 1, as in the pipeline.
        eta: of DDIM, 0 for the deterministic chain (every sigma_k = 0) up to 1 for the noise of DDPM.

    Raises:
        ValueError: if the scheduler's steps are not of this form.
    """

    def __init__(
        self,
        unet,
        scheduler,
        prompt_embeds,
        negative_prompt_embeds=None,
        pooled_prompt_embeds=None,
        negative_pooled_prompt_embeds=None,
        *,
        time_ids=None,
        guidance_scale=5.0,
        eta=1.0,
    ):
        self.unet = unet
        self.scheduler = copy.deepcopy(scheduler)  # whose add_noise moves its tables to the device of the latents
        self.guidance_scale = guidance_scale
        # Numbers and tensors that are where they are needed: nothing waits for the device while the chain runs.
        self.steps = denoising_steps(scheduler, eta)
        self.timesteps = scheduler.timesteps.to(prompt_embeds.device)
        self.time_ids = time_ids
        self._condition_on(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)

    def _condition_on(
        self,
        prompt_embeds,
        negative_prompt_embeds=None,
        pooled_prompt_embeds=None,
        negative_pooled_prompt_embeds=None,
    ):
        # Detached: a graph back into the text encoder would be spent by the first of the sweep's backward calls.
        def expanded(embeds, *shape):
            return None if embeds is None else embeds.detach().expand(*shape)

        batch = prompt_embeds.shape[-3]
        self.prompt_embeds = expanded(prompt_embeds, self.num_steps, batch, -1, -1)
        self.negative_prompt_embeds = expanded(negative_prompt_embeds, batch, -1, -1)
        self.pooled_prompt_embeds = expanded(pooled_prompt_embeds, self.num_steps, batch, -1)
        self.negative_pooled_prompt_embeds = expanded(negative_pooled_prompt_embeds, batch, -1)
        self.guided = negative_prompt_embeds is not None and self.guidance_scale > 1

    def conditioned_on(self, *embeds):
        """The same chain under other prompts, embedded as in the constructor."""
        chain = copy.copy(self)
        chain._condition_on(*embeds)
        return chain

    def repeat(self, i, copies):
        """The chain of picture i alone, for a batch of `copies`; nothing is encoded again."""
        embeds = self.prompt_embeds[:, i : i + 1].expand(-1, copies, -1, -1)
        pooled, negative, negative_pooled = self.pooled_prompt_embeds, self.negative_prompt_embeds, None
        if pooled is not None:
            pooled = pooled[:, i : i + 1].expand(-1, copies, -1)
        if negative is not None:
            negative = negative[i : i + 1]
        if self.negative_pooled_prompt_embeds is not None:
            negative_pooled = self.negative_pooled_prompt_embeds[i : i + 1]
        return self.conditioned_on(embeds, negative, pooled, negative_pooled)

    @property
    def num_steps(self):
        return len(self.steps)

    def sigma(self, k):
        return self.steps[self.num_steps - k].sigma

    def mean(self, k, x):
        """mu_k(x_k): latents (B, C, H, W) of step k -> the mean (B, C, H, W) of the latents of step k - 1."""
        step = self.steps[self.num_steps - k]
        return step.x_from_x * x + step.x_from_e * self._prediction(k, x)

    def predict(self, k, x):
        """(mu_k(x_k), x0_hat(x_k)), (B, C, H, W) each: the mean and, from the same U-Net call, the predicted x_0."""
        step, e = self.steps[self.num_steps - k], self._prediction(k, x)
        return step.x_from_x * x + step.x_from_e * e, step.x0_from_x * x + step.x0_from_e * e

    def _prediction(self, k, x):
        """The guided prediction of the U-Net at x_k."""
        i = self.num_steps - k
        embeds, added = self.prompt_embeds[i], None
        model_input = self.steps[i].input_scale * x
        if self.guided:
            embeds = torch.cat([self.negative_prompt_embeds, embeds])
            model_input = torch.cat([model_input, model_input])
        if self.pooled_prompt_embeds is not None:
            pooled = self.pooled_prompt_embeds[i]
            if self.guided:
                pooled = torch.cat([self.negative_pooled_prompt_embeds, pooled])
            added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(len(pooled), -1)}
        prediction = self.unet(
            model_input.to(embeds.dtype), self.timesteps[i], encoder_hidden_states=embeds, added_cond_kwargs=added
        ).sample.to(x.dtype)
        if self.guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
        return prediction

    def renoise(self, x_0, noise):
        """x_1 as the forward process draws it from x_0 and a noise of unit variance, (B, C, H, W) each."""
        return self.scheduler.add_noise(x_0, noise, self.timesteps[-1:])


def decode_latents(vae, latents):
    """Latents (B, C, h, w) of a Stable Diffusion or SDXL pipeline -> images (B, 3, H, W) in [0, 1], differentiable."""
    latents = latents.to(vae.dtype)
    # Of some VAEs of SDXL; others do not name them, or not both.
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        latents = latents / vae.config.scaling_factor
    else:
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        latents = latents * std / vae.config.scaling_factor + mean
    images = vae.decode(latents, return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
