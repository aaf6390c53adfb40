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
"""The RLR step for any training loop: rollout, scores, advantages, sweep and statistics in one object."""

import random
import warnings
from functools import partial
from numbers import Integral
from typing import NamedTuple

import torch

from . import estimators
from .advantages import Advantages
from .batch import Batch, check_batches, prompt_numbers
from .branching import branch
from .kept_graphs import KeptGraphs
from .kl import GaussianKL
from .mixing import AdaptiveMixing, Transport
from .policy_gradient import ClippedRatio
from .rollout import renoise, rollout
from .scores import Scorer
from .settings import Settings, check_inputs, check_reward, check_settings
from .shared_draws import SharedDraws
from .sweep import ANOTHER_NETWORK, SweepStatistics, backward_sweep, is_of_another_network, likelihood_ratio
from .zeroth_order import PerturbedChain, WeightPerturbation


class Calls(NamedTuple):
    """Calls of the network for one image: forward passes, and recomputed ones with their vector-Jacobian product."""

    forward: float
    swept: float


class RLRStep:
    r"""RLR (huggingface.co/papers/2502.00639) and the estimators that it is compared with, for any training loop:

        rlr = RLRStep(num_steps, differentiable=True)
        batches = [rlr.rollout(chain, x_T, score) for chain, x_T, score in micro_batches]
        rlr.backward(batches)                   # the gradient of -(mean reward) is in .grad
        optimizer.step()

    What "auto" stands for is decided by `draw_schedule` and `predicted_steps`, from statistics of earlier batches only.

    Args:
        num_steps: T, an integer of at least 1.
        differentiable: whether the reward, or a part of it, has a gradient.
        black_box: whether a part of a reward with a gradient has none; always true of a reward without one.
        settings: see `Settings`.

    Raises:
        ValueError: for settings that do not go together, or not with the reward.
    """

    def __init__(self, num_steps, differentiable=True, *, black_box=False, **settings):
        if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
            raise ValueError(f"num_steps {num_steps!r} is not a number of denoising steps: an integer of at least 1")
        self.settings = Settings.of(settings)
        self.num_steps = num_steps
        self.differentiable, self.black_box = differentiable, black_box or not differentiable
        check_settings(self.settings, num_steps)
        check_reward(self.settings, self.differentiable, self.black_box)
        # What decides how often the network is called.
        self.rng = random if self.settings.shared_seed is None else SharedDraws(self.settings.shared_seed)
        self.adaptive = AdaptiveMixing(num_steps)
        self.transport = Transport(num_steps)
        self.subchain = estimators.SubchainSampler(
            num_steps,
            self.settings.subchain_length if self.settings.estimator == "rlr_paper" else 0,
            *(self.settings.subchain_range or ()),
            by_gradient_norm=self.settings.subchain_sampling == "grad_norm",
        )
        self.advantages = Advantages(self.settings, num_steps)
        self.scored = Scorer(self.differentiable, self.black_box)
        self.kept = KeptGraphs(self.settings.keep_graphs if self.settings.can_keep_graphs else 0, num_steps)
        self._schedule, self.warned = None, False

    # The schedule of an optimizer step

    def draw_schedule(self):
        """The `Schedule` of an optimizer step. AlignProp's K and the start of a sub-chain are drawn; everything else comes
        from the settings and from statistics of earlier batches."""
        settings, num_steps = self.settings, self.num_steps
        if settings.estimator == "rlr":
            mixing = self.adaptive if settings.mixing == "auto" else settings.mixing
            schedule = estimators.rlr(num_steps, mixing, self.differentiable)
        elif settings.estimator == "rlr_paper":
            schedule = estimators.rlr_paper(
                num_steps, self.subchain.draw(self.rng), settings.subchain_length, settings.rest, self.differentiable
            )
        elif settings.estimator == "truncated_bp":
            schedule = estimators.truncated_bp(num_steps, settings.truncation_steps)
        elif settings.estimator == "alignprop":
            schedule = estimators.alignprop(num_steps, self.rng)
        else:
            schedule = getattr(estimators, settings.estimator)(num_steps)
        schedule = schedule._replace(transport=list(self.transport.gains), fraction=self._fraction(schedule))
        return schedule.reaching(settings.trained_steps)

    def _fraction(self, schedule):
        """`sweep_fraction`, or what "auto" stands for."""
        if self.settings.sweep_fraction != "auto":
            return self.settings.sweep_fraction
        if self.settings.estimator != "rlr" or self.black_box:
            return 1.0
        gammas = [schedule.mixing[k] for k in schedule.swept[1:]]
        # Where the likelihood ratio has a share, its noise is most of all noise, and fewer steps would add to it.
        return 0.5 if sum(gammas) >= 0.95 * len(gammas) else 1.0

    def predicted_steps(self, schedule):
        """The steps at which the reward of the predicted image is the baseline.

        With "auto" those of rlr at which it pays: all with a black box. With a gradient only where the likelihood ratio has
        a share of more than 5 %, and in the last half of the chain, where the prediction shows most of the image and small
        sigmas make for the most noise.
        """
        settings, num_steps = self.settings, self.num_steps
        steps = range(1, num_steps + 1)[: settings.baseline_steps]
        if settings.baseline != "auto":
            return list(steps) if settings.baseline == "predicted_x0" else []
        if settings.estimator != "rlr" or settings.branches:
            return []
        swept = [k for k in schedule.swept if k in steps]
        if self.black_box:
            return swept
        return [k for k in swept if k <= num_steps / 2 and 1 - schedule.mixing[k] > 0.05]

    def swept_steps(self, schedule):
        """How many steps an image is swept at under a schedule, on average over the draws of `sweep_fraction`."""
        if self.settings.branches:
            return 1
        if self.settings.estimator == "draft_lv":
            return self.settings.lv_samples
        return schedule.expected_steps

    def expected_calls(self, schedule):
        """The `Calls` of the network that an image takes on average, where each guided call counts as one."""
        settings, num_steps = self.settings, self.num_steps
        swept, probabilities = self.swept_steps(schedule), schedule.probabilities
        if settings.branches:
            return Calls(num_steps + 1 + settings.branches * (num_steps - 1), swept)
        if settings.estimator == "alignprop":  # whose K is uniform in 1..T
            whole = schedule._replace(stop_after=num_steps).probabilities
            probabilities = {k: (num_steps - k + 1) / num_steps * p for k, p in whole.items()}
            swept = sum(probabilities.values())
        kept = sum(p for k, p in probabilities.items() if k <= self.kept.steps)
        return Calls(num_steps - kept + (swept if settings.kl_weight > 0 else 0), swept)

    def noisy_steps(self, schedule):
        """The steps of a schedule at which the chain must add noise."""
        if self.settings.kl_weight > 0 or self.settings.branches:
            return schedule.swept
        last = [1] if self.differentiable and self.black_box else []
        return [k for k in schedule.swept if schedule.mixing[k] < 1] + last

    def check_chain(self, chain, schedule):
        """Refuse a chain that the schedule cannot be swept on.

        Raises:
            ValueError: if it has another number of steps, a step without noise where noise is needed, or no `predict`,
                `repeat` or `renoise` where these are.
        """
        settings = self.settings
        if chain.num_steps != self.num_steps:
            raise ValueError(f"the chain has {chain.num_steps} steps, RLRStep was made for {self.num_steps}")
        for needed, method in (
            (settings.baseline == "predicted_x0", "predict"),
            (settings.branches > 0, "repeat"),
            (settings.estimator == "draft_lv", "renoise"),
        ):
            if needed and not hasattr(chain, method):
                raise ValueError(f"a chain without `{method}` cannot be used with this estimator and baseline")
        for k in (k for k in self.noisy_steps(schedule) if chain.sigma(k) == 0):
            raise ValueError(
                f"the chain adds no noise at step {k} from the end, where {settings.estimator} needs it for a reward"
                f" {'with' if self.differentiable else 'without'} a gradient"
                f"{' and a part without' if self.differentiable and self.black_box else ''}"
                f"{' and the divergence from the base model' if settings.kl_weight > 0 else ''}: use an eta above 0, a scheduler with"
                " noise there, for a flow the final_noise of ddim_steps, or without a black box full_bp"
            )

    # prompt -> rollout -> reward

    def rollout(self, chain, x_T, score, generator=None, *, prompts=None, score_predictions=None):
        """Run the chain and score where it ends.

        The first rollout of an optimizer step draws its schedule.

        Args:
            chain: see `rlr_utils.chain`.
            x_T: (B, ...), the latents to start from.
            score: `score(x_0, with_gradient) -> (rewards (B,), dR/dx_0 (B, ...) or None)`, called with autograd on. Where a
                part of the reward has no gradient, dR/dx_0 is that of the other part, and `score` returns as a third
                result the rewards (B,) of the part without.
            generator: as in `rlr_utils.rollout`.
            prompts: B strings, for baseline="per_prompt".
            score_predictions: like `score`, for the predicted images of all steps at once, (S B, ...), of which image i has
                the prompt i mod B; such as one with a cheaper decoder. Default: `score`, once for every step.

        Returns:
            Batch, with `x_0`, `rewards` and `trajectory`.

        Raises:
            ValueError: as `check_chain` does, and if `score` does not return what it should.
        """
        check_inputs(self.settings, len(x_T), prompts)
        if self._schedule is None:
            self._schedule = self.draw_schedule()
            self.kept.begin(x_T)
        self.check_chain(chain, self._schedule)
        run = partial(self._rollout, chain, x_T, score, generator, prompts, score_predictions)
        return self.kept.rolled_out(run, generator, x_T)

    def _rollout(self, chain, x_T, score, generator, prompts, score_predictions):
        """`rollout`, checked."""
        settings, schedule = self.settings, self._schedule
        predict = self.predicted_steps(schedule) if hasattr(chain, "predict") else []
        perturbation = WeightPerturbation(
            settings.parameters, settings.zo_scale, random.getrandbits(62), schedule.perturbed
        )
        schedule = schedule.draw(self.rng)
        keep = [k for k in schedule.swept if k <= self.kept.steps and schedule.weights[k] > 0]
        perturbed = PerturbedChain(chain, perturbation) if schedule.perturbed else chain
        trajectory = rollout(perturbed, x_T, generator, predict, keep)
        # DRaFT-LV takes its gradient at other noises of the same images.
        with_gradient = self.differentiable and settings.estimator not in ("ddpo", "draft_lv")
        rewards, black_box, reward_grad = self.scored(score, trajectory.latents[0], with_gradient)
        predicted = self.scored.predictions(trajectory, score, score_predictions) if predict else None
        groups = prompt_numbers(prompts, rewards.device) if settings.baseline == "per_prompt" else None
        return Batch(
            chain, score, trajectory, schedule, rewards, black_box, reward_grad, predicted, groups, perturbation
        )

    # reward -> advantages -> sweep

    def backward(self, batches, loss_scale=1.0):
        """Add the gradient of -(mean reward over all images of the batches) to `.grad`.

        The first call compares the rewards of all batches and ranks. With `num_inner_epochs` it is called again on the same
        batches after each optimizer step. The gradient is this rank's; average it over the ranks.

        Args:
            batches: all from `rollout` since the last `backward`, a list; they may differ in size. One call for each batch would
                add up gradients that are means, and compare each reward with fewer others.
            loss_scale: a factor of the gradient, for float16.

        Returns:
            {"gamma_mean", "predicted_steps", "swept_steps"}: the mean share of the pathwise gradient over the swept steps, and
            the numbers of steps per image that were predicted and swept; with `kl_weight` also "kl", nats per image of
            all swept steps, and with inner epochs "clip_fraction". The last two are means over all ranks.

        Raises:
            ValueError: if a reward is not finite, or the batches are not what they should be.
        """
        check_batches(batches, self.settings.num_inner_epochs)
        self._schedule = None
        self.scored.check()
        if batches[0].advantages is None:
            self.advantages.compare(batches)
        num_images = sum(len(batch.rewards) for batch in batches)
        seen, kls, clipped = [], [], []
        for batch in batches:
            scale = loss_scale * len(batch.rewards) / num_images
            # The metrics are means over images, taken as means over batches: a batch counts by its size.
            share = len(batches) * len(batch.rewards) / num_images
            penalty = None
            if self.settings.kl_weight > 0:
                penalty = GaussianKL(
                    batch.chain, self._base_mean(batch.chain), batch.trajectory, scale * batch.kl_weight
                )
            if not self.settings.sweeps_the_rollout:
                (self._sweep_branches if self.settings.branches else self._sweep_renoised)(batch, scale)
            elif self.settings.num_inner_epochs > 1:
                clipped += [share * fraction for fraction in self._sweep_ratio(batch, scale, penalty)]
            else:
                seen.append(self._sweep(batch, scale, penalty))
            if penalty is not None:
                weights = batch.schedule.weights
                kls.append(share * sum(weights[k] * value for k, value in penalty.divergences.items()))
        self.scored.check()
        self.kept.settle(batches)
        self._learn(seen)
        return self._metrics(batches[0], kls, clipped)

    def _sweep(self, batch, scale, penalty):
        """The sweep of the rollout's chain; returns the statistics (5, T + 1), free of the scale."""
        advantages, reward_grad = batch.advantages, batch.reward_grad
        if reward_grad is not None and self.black_box:
            reward_grad = reward_grad + likelihood_ratio(batch.chain, batch.trajectory, 1, advantages["black_box"])
        statistics = backward_sweep(
            batch.chain,
            batch.trajectory,
            batch.schedule,
            reward_grad=None if reward_grad is None else scale * reward_grad,
            advantages=scale * advantages["total"],
            penalty=penalty,
            parameters=self.settings.parameters if self.subchain.by_gradient_norm else None,
        )
        batch.perturbation.add_gradient(scale * batch.mean_advantage)
        pathwise, ratio, norm, gain, deviation = statistics
        return torch.stack([pathwise / scale**2, ratio / scale**2, norm / scale, gain, deviation])

    def _sweep_ratio(self, batch, scale, penalty):
        """The sweep with PPO's ratio; returns the fraction of the batch that was clipped at each step."""
        ratio = ClippedRatio(
            batch.chain, batch.trajectory, scale * batch.advantages["total"], self.settings.ppo_clip_range
        )
        backward_sweep(batch.chain, batch.trajectory, batch.schedule, cotangent=ratio, penalty=penalty)
        return ratio.clipped

    def _sweep_renoised(self, batch, scale):
        """The last step again from other noises of the same images, for DRaFT-LV."""
        samples = self.settings.lv_samples
        for _ in range(samples):
            renoised = renoise(batch.chain, batch.x_0)
            _, _, reward_grad = self.scored(batch.score, renoised.latents[0], with_gradient=True)
            mixing = batch.schedule.mixing
            backward_sweep(batch.chain, renoised, mixing, reward_grad=scale / samples * reward_grad, stop_after=1)

    def _sweep_branches(self, batch, scale):
        branch(
            batch.chain,
            batch.trajectory,
            lambda x_0: self.scored(batch.score, x_0)[0],
            self.settings.branches,
            scale,
            self.rng,
        )

    def _base_mean(self, chain):
        """The chain's means under the base model, without a second one in memory."""

        @torch.no_grad()
        def mean(k, x):
            with self.settings.base_model():
                return chain.mean(k, x)

        return mean

    def _learn(self, seen):
        """Update the statistics that the next schedule depends on, from all batches and ranks."""
        if seen:
            # At each step the mean over those batches that have swept it.
            gathered = self.settings.gather(torch.stack(seen))
            if gathered.isinf().any():  # float16 has overflowed, and the optimizer will skip the step
                return
            statistics = SweepStatistics(*gathered.nanmean(0))
            if not self.warned and is_of_another_network(statistics):
                self.warned = True
                warnings.warn(ANOTHER_NETWORK)
            for learner in (self.adaptive, self.subchain, self.transport):
                learner.update(statistics)

    def _metrics(self, batch, kls, clipped):
        gammas = [batch.schedule.mixing[k] for k in batch.schedule.swept]
        metrics = {
            "gamma_mean": sum(gammas) / len(gammas),
            "predicted_steps": 0 if batch.predicted is None else len(self.predicted_steps(batch.schedule)),
            "swept_steps": self.swept_steps(batch.schedule),
        }
        for name, values in (("kl", kls), ("clip_fraction", clipped)):
            if values:
                metrics[name] = self.settings.gather(torch.stack(values).mean()[None]).mean().item()
        return metrics

    # Checkpoints

    @property
    def _parts(self):
        named = {"mixing": self.adaptive, "subchain": self.subchain, "transport": self.transport}
        for part, running in self.advantages.running.items():
            named[f"running_{part}"], named[f"predictor_{part}"] = running, self.advantages.predictors[part]
        return named if self.settings.shared_seed is None else {**named, "draws": self.rng}

    def state_dict(self):
        """All that the step remembers of earlier batches, JSON-ready."""
        return {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state):
        """Raises ValueError for a state that lacks a part, or is of another number of steps."""
        missing = sorted(self._parts.keys() - state.keys())
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing)}")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._schedule = None
