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
"""Denoising chains, as the rollout and the sweep see them.

A chain is anything with three members:

    chain.num_steps -> int         T, the number of steps
    chain.sigma(k) -> float        standard deviation of the noise that step k injects; k = T runs first, k = 1 last
    chain.mean(k, x) -> Tensor     mu_k(x_k), differentiable in x and in the trainable parameters

so that one step is x_{k-1} = mu_k(x_k) + sigma_k z_k with z_k ~ N(0, I). Some estimators ask for more:

    chain.predict(k, x)            (mu_k(x_k), x0_hat(x_k)), for the predicted-x_0 baseline
    chain.repeat(i, copies)        the chain of image i alone, for a batch of `copies`, for branching
    chain.renoise(x_0, noise)      x_1 as the forward process draws it from x_0, for DRaFT-LV
"""

import copy
import inspect
import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from .rollout import draw_noise


class AffineStep(NamedTuple):
    """One step of a scheduler, for a prediction e that the network makes of `input_scale` x:

    x_{k-1} = x_from_x x + x_from_e e + sigma z,        x0_hat = x0_from_x x + x0_from_e e
    """

    x_from_x: float
    x_from_e: float
    sigma: float
    x0_from_x: float
    x0_from_e: float
    input_scale: float


def scheduler_steps(scheduler, eta):
    """The `AffineStep` of each timestep of a diffusers scheduler, the first executed first.

    The scheduler itself is asked: it steps from a few known numbers, whose results give the coefficients, and from random
    numbers, whose results the coefficients must reproduce. So no scheduler is re-implemented here, and one that remembers
    earlier steps, clips its predictions or draws its noise in another way is detected.

    Args:
        scheduler: with `set_timesteps` already called; it is left unchanged.
        eta: for schedulers whose `step` takes it.

    Raises:
        ValueError: for a scheduler without `set_timesteps`, or whose steps are not of this form, and for a step that is not
            finite. Noise prediction is not finite where the schedule starts in pure noise, since it divides by an alpha of zero.
    """
    if getattr(scheduler, "num_inference_steps", 1) is None:
        raise ValueError(f"{type(scheduler).__name__}: call its set_timesteps with a number of steps first")
    if not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be used here: for flow matching take `ddim_steps` of its sigmas"
        )
    asked = copy.deepcopy(scheduler)
    asked.set_timesteps(len(scheduler.timesteps))  # which forgets the steps taken so far
    options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
    numbers = torch.Generator().manual_seed(0)
    return [_probe(asked, i, options, numbers) for i in range(len(asked.timesteps))]


def _probe(scheduler, i, options, numbers):
    """The `AffineStep` at the i-th timestep of a scheduler that has taken the i steps before.

    Of four latents x and predictions e the first two give the coefficients and the third the noise; the fourth is random
    and checks them.
    """
    name, timestep = type(scheduler).__name__, scheduler.timesteps[i]
    x, e = torch.zeros(2, 4, 1, 1, 1)
    x[0] = e[1] = 1.0
    x[3], e[3] = torch.randn(2, generator=numbers)
    z = draw_noise(x.shape, torch.Generator().manual_seed(i), like=x)
    try:
        input_scale = scheduler.scale_model_input(torch.ones(1), timestep).item()
        generator = torch.Generator().manual_seed(i)
        results = scheduler.step(e, timestep, x, generator=generator, return_dict=False, **options)
        x0 = results[1] if len(results) > 1 else scheduler.model_outputs[-1]  # DPM-Solver does not return its x_0
    except (TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise ValueError(f"{name} cannot be used here: {error}") from error
    sigma = results[0][2] / z[2]
    mean = results[0] - sigma * z
    step = AffineStep(*(v.item() for v in (mean[0], mean[1], sigma, x0[0], x0[1])), input_scale)
    where = (
        f"{name}, prediction_type {scheduler.config.prediction_type!r}, step {len(scheduler.timesteps) - i} from the end"
        f" (timestep {timestep.item():g})"
    )
    if not all(map(math.isfinite, step)):
        raise ValueError(f"{where}: the step is not finite; another eta or number of steps may help")
    expected = step.x_from_x * x[3] + step.x_from_e * e[3], step.x0_from_x * x[3] + step.x0_from_e * e[3]
    if not all(torch.allclose(*pair, rtol=1e-3, atol=1e-3) for pair in zip((mean[3], x0[3]), expected)):
        raise ValueError(f"{where}: not a Gaussian step whose mean is affine in latents and prediction")
    # DDPM keeps its variance above a number too small for float32 to add to latents.
    return step if abs(step.sigma) >= 1e-6 else step._replace(sigma=0.0)


def prediction_weights(steps):
    r"""How much the prediction of each step weighs in the image, as shares that add up to 1; the first executed first.

    With all other predictions held fixed, a change of the prediction at step k changes x_0 by the factor
    $b_k a_{k-1} \cdots a_1$, where $a$ is `x_from_x` and $b$ is `x_from_e`. A last step of little weight leaves little to
    learn for estimators that differentiate it alone.
    """
    weights, passed_on = [], 1.0
    for step in reversed(steps):
        weights.append(abs(step.x_from_e) * passed_on)
        passed_on *= abs(step.x_from_x)
    return [weight / sum(weights) for weight in reversed(weights)]


def linear_guidance(negative, positive, scale):
    """Classifier-free guidance, e = e_neg + s (e_pos - e_neg) (huggingface.co/papers/2207.12598)."""
    return negative + scale * (positive - negative)


def joined(parts):
    """Conditions {name: (B_i, ...)} of several batches -> those of one batch.

    If a mask is among them, a condition whose name ends in "_mask", prompts of differing length are padded with zeros, which
    is the mask's own word for padding. Without one they must have the same length.
    """
    is_masked = any(name.endswith("_mask") for name in parts[0])
    return {name: _stacked([part[name] for part in parts], is_masked) for name in parts[0]}


def _stacked(tensors, is_masked):
    if is_masked and tensors[0].ndim > 1:
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [torch.cat([t, t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
    return torch.cat(tensors)


class DenoisingChain:
    r"""The chain that a denoising network and a list of steps define under classifier-free guidance.

    The prediction is guided, and so is the mean: the gradient flows through both halves of the guided call.

    Args:
        call: `call(x, timestep, conditions) -> prediction`, one forward pass of the network.
        steps: T `AffineStep`, the first executed first, such as `scheduler_steps` returns.
        timesteps: (T,), what the network is told at each step.
        conditions: {name: (B, ...)} for the whole chain, or a list of T of them for a prompt per step.
        negative: {name: (B, ...)} of the negative prompts, {name: (1, ...)} for the same in all images, or `None` for no
            guidance. Where they differ in length from the others they need a mask, see `joined`.
        guidance_scale: s, or a list of T; guidance is off if the first s is at most 1, as in diffusers' pipelines.
        guide: `guide(negative, positive, s) -> prediction`.
        add_noise: `add_noise(x_0, noise) -> x_1`, the forward process up to the last step, for `renoise`.
        init_noise_sigma: standard deviation of x_T.

    Attributes:
        split_guidance: whether the two halves of guidance are two calls, of whose graphs a sweep holds one at a time: half the
            memory, for another forward pass of one half in each swept step. Default: `False`.

    Raises:
        ValueError: for timesteps, or a list of conditions or scales, that are not T.
    """

    split_guidance = False

    def __init__(
        self,
        call,
        steps,
        timesteps,
        conditions,
        negative=None,
        *,
        guidance_scale=5.0,
        guide=linear_guidance,
        add_noise=None,
        init_noise_sigma=1.0,
    ):
        self.call, self.steps, self.timesteps = call, steps, timesteps
        self.num_steps = len(steps)
        if len(timesteps) != self.num_steps:
            raise ValueError(f"{len(timesteps)} timesteps for a chain of {self.num_steps}")
        self.guidance_scales = self._by_step(guidance_scale, "guidance scales")
        self.guide, self.add_noise = guide, add_noise
        self.init_noise_sigma = init_noise_sigma
        self._condition_on(conditions, negative)

    def _by_step(self, given, what):
        """A list with one for each step, from such a list or from the one for all."""
        by_step = given if isinstance(given, list) else [given] * self.num_steps
        if len(by_step) != self.num_steps:
            raise ValueError(f"{what} of {len(by_step)} steps for a chain of {self.num_steps}")
        return by_step

    def _condition_on(self, conditions, negative):
        by_step = self._by_step(conditions, "conditions")
        # Detached: a graph back into a text encoder would be used up by the sweep's first backward call.
        self.conditions = [{name: value.detach() for name, value in one.items()} for one in by_step]
        self.guided = negative is not None and self.guidance_scales[0] > 1
        self.negative = None
        if negative is not None:
            batch = len(next(iter(self.conditions[0].values())))
            self.negative = {name: value.detach().expand(batch, *value.shape[1:]) for name, value in negative.items()}

    def conditioned_on(self, conditions, negative=None):
        """The same chain with other prompts, given as to the constructor."""
        chain = copy.copy(self)
        chain._condition_on(conditions, negative)
        return chain

    def repeat(self, i, copies):
        """The chain of image i alone, for a batch of `copies`."""

        def repeated(conditions):
            return {name: value[i : i + 1].expand(copies, *value.shape[1:]) for name, value in conditions.items()}

        negative = None if self.negative is None else repeated(self.negative)
        return self.conditioned_on([repeated(one) for one in self.conditions], negative)

    def sigma(self, k):
        return self.steps[self.num_steps - k].sigma

    def mean(self, k, x):
        """mu_k(x_k): latents (B, ...) of step k -> the mean (B, ...) of the latents of step k - 1."""
        step = self.steps[self.num_steps - k]
        return step.x_from_x * x + step.x_from_e * self._prediction(k, x)

    def predict(self, k, x):
        """(mu_k(x_k), x0_hat(x_k)), (B, ...) each: the mean and, from the same call of the network, the predicted x_0."""
        step, e = self.steps[self.num_steps - k], self._prediction(k, x)
        return step.x_from_x * x + step.x_from_e * e, step.x0_from_x * x + step.x0_from_e * e

    def _prediction(self, k, x):
        """The guided prediction of the network at x_k."""
        i = self.num_steps - k
        conditions, model_input = self.conditions[i], self.steps[i].input_scale * x
        if not self.guided:
            return self.call(model_input, self.timesteps[i], conditions).to(x.dtype)
        halves = (self._two_calls if self.split_guidance else self._one_call)(
            model_input, self.timesteps[i], conditions
        )
        return self.guide(*(half.to(x.dtype) for half in halves), self.guidance_scales[i])

    def _one_call(self, x, timestep, conditions):
        """The predictions for the negative and for the other prompts, of one call."""
        return self.call(torch.cat([x, x]), timestep, joined([self.negative, conditions])).chunk(2)

    def _two_calls(self, x, timestep, conditions):
        """As `_one_call`. A backward pass uses up the second graph before it computes the first one again."""
        first = checkpoint(self.call, x, timestep, self.negative, use_reentrant=False, preserve_rng_state=False)
        return first, self.call(x, timestep, conditions)

    def renoise(self, x_0, noise):
        """x_1 as the forward process draws it from x_0 and a noise of unit variance, (B, ...) each."""
        if self.add_noise is None:
            raise ValueError("the chain has no add_noise, which re-noising needs")
        return self.add_noise(x_0, noise)
