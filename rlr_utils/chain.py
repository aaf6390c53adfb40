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
"""The denoising chain of a Stable Diffusion pipeline, as the rollout and the sweep see it.

A chain is anything with three members:

    chain.num_steps -> int         T, the number of steps
    chain.sigma(k) -> float        standard deviation of the noise that step k injects; k = T runs first, k = 1 last
    chain.mean(k, x) -> Tensor     mu_k(x_k), differentiable in x and in the trainable parameters

so that one step is x_{k-1} = mu_k(x_k) + sigma_k z_k with z_k ~ N(0, I).
"""

import copy

import torch


class StableDiffusionChain:
    r"""The chain that a pipeline's U-Net and scheduler define under classifier-free guidance.

    mu_k and sigma_k are the scheduler's own: mu_k is its step with zero noise, sigma_k what the step adds for a noise
    of one. The noise prediction is guided, e = e_uncond + s (e_cond - e_uncond) (huggingface.co/papers/2207.12598), and
    so is the mean: the gradient flows through both halves.

    Args:
        unet: predicts from (x, timestep, encoder_hidden_states=...) and returns an object with `.sample`.
        scheduler: a scheduler whose `step` takes `eta` and `variance_noise` (DDIM, huggingface.co/papers/2010.02502),
            with `set_timesteps` already called.
        prompt_embeds: (B, L, D) for the whole chain, or (T, B, L, D) for one prompt per step, the first executed first.
            The U-Net runs in the dtype of these embeddings, the latents keep their own.
        negative_prompt_embeds: (B, L, D), or `None` for no guidance.
        guidance_scale: s; guidance is off at s <= 1, as in the pipeline.
        eta: 0 for the deterministic chain (every sigma_k = 0) up to 1 for the noise of DDPM.
    """

    def __init__(self, unet, scheduler, prompt_embeds, negative_prompt_embeds=None, *, guidance_scale=5.0, eta=1.0):
        self.unet = unet
        self.scheduler = scheduler
        # The scheduler looks its tables up by number, on the CPU; the U-Net takes what is on its device already. Nothing
        # then waits for the device while the chain runs.
        self.timesteps = scheduler.timesteps.tolist()
        self._timesteps = scheduler.timesteps.to(prompt_embeds.device)
        # Detached: a graph back into the text encoder would be spent by the first of the sweep's backward calls.
        self.prompt_embeds = prompt_embeds.detach().expand(self.num_steps, *prompt_embeds.shape[-3:])
        self.negative_prompt_embeds = None if negative_prompt_embeds is None else negative_prompt_embeds.detach()
        self.guidance_scale = guidance_scale
        self.guided = negative_prompt_embeds is not None and guidance_scale > 1
        self.eta = eta
        zero, one = torch.zeros(1), torch.ones(1)
        self._sigmas = [self._step(zero, t, zero, noise=one)[0].item() for t in self.timesteps]

    @property
    def num_steps(self):
        return len(self.timesteps)

    def sigma(self, k):
        return self._sigmas[self.num_steps - k]

    def mean(self, k, x):
        """mu_k(x_k): latents (B, C, H, W) of step k -> the mean (B, C, H, W) of the latents of step k - 1."""
        return self.predict(k, x)[0]

    def predict(self, k, x):
        """(mu_k(x_k), x0_hat(x_k)), (B, C, H, W) each: the mean and, from the same U-Net call, the predicted x_0."""
        i = self.num_steps - k
        embeds = self.prompt_embeds[i]
        if self.guided:
            embeds = torch.cat([self.negative_prompt_embeds, embeds])
        model_input = torch.cat([x, x]) if self.guided else x
        model_input = model_input.to(embeds.dtype)
        prediction = self.unet(model_input, self._timesteps[i], encoder_hidden_states=embeds).sample.to(x.dtype)
        if self.guided:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + self.guidance_scale * (conditional - unconditional)
        return self._step(prediction, self.timesteps[i], x, noise=torch.zeros_like(x))

    def repeat(self, i, copies):
        """The chain of picture i alone, for a batch of `copies`; nothing is encoded again."""
        chain = copy.copy(self)
        chain.prompt_embeds = self.prompt_embeds[:, i : i + 1].expand(-1, copies, -1, -1)
        if self.guided:
            chain.negative_prompt_embeds = self.negative_prompt_embeds[i : i + 1].expand(copies, -1, -1)
        return chain

    def renoise(self, x_0, noise):
        """x_1 as the forward process draws it from x_0 and a noise of unit variance, (B, C, H, W) each."""
        return self.scheduler.add_noise(x_0, noise, torch.tensor(self.timesteps[-1:]))

    def _step(self, prediction, timestep, x, noise):
        return self.scheduler.step(prediction, timestep, x, eta=self.eta, variance_noise=noise, return_dict=False)


def decode_latents(vae, latents):
    """Latents (B, C, h, w) of a Stable Diffusion pipeline -> images (B, 3, H, W) in [0, 1], differentiable."""
    images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
    return (images.float() / 2 + 0.5).clamp(0, 1)
