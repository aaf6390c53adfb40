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
"""The optimizer, its learning rate, and what happens to a gradient before it gets there."""

import math
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from accelerate.logging import get_logger
from torch.autograd.graph import increment_version
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .errors import RunError


logger = get_logger(__name__, log_level="INFO")

# So many steps in a row without a finite gradient end the run. In float16 the loss scale is halved at each: from 2^10, where
# it starts, to 1, where it is not the problem.
MOST_SKIPPED = 10


class GradientClipping:
    r"""What the gradient of an optimizer step is multiplied by.

    A reward has a unit of its own, and so has its gradient: no fixed norm fits an aesthetic score, a file size and a
    cosine. And gradients through a chain are heavy-tailed, so that Adam's second moments would remember an outlier for a
    thousand steps. With "auto" the gradient g_t, of norm n_t, is multiplied by

        min(1, b_t / n_t) / s_t

    where the scale s_t is the median of the last 20 norms before n_t, and the bound b_t the larger of 2 s_t and the 99th
    percentile of the last 200. Both are known before the gradient is drawn. So all but outliers are multiplied by a number
    that does not depend on them, and their mean keeps its direction. To divide each gradient by its own norm would weigh a
    rare large gradient as little as a frequent small one, and may turn the mean around.

    Negligible norms, below a thousandth of that percentile, are left out: where all rewards of a batch are equal, as with a
    rare success, its gradient is 0 up to rounding. The very first gradient is divided by its own norm, for want of others.

    Args:
        max_norm: the largest norm, or "auto".
    """

    SCALE_WINDOW, BOUND_WINDOW, PERCENTILE, LEAST_BOUND = 20, 200, 0.99, 2.0

    def __init__(self, max_norm):
        self.max_norm, self.norms = max_norm, []

    def factor(self, norm):
        """What a gradient of this norm, which is finite, is to be multiplied by. "auto" remembers the norm."""
        if self.max_norm != "auto":
            return self.max_norm / max(norm, self.max_norm)
        negligible = 1e-3 * self._percentile(self.norms) if self.norms else 0.0
        usual = [past for past in self.norms if past > negligible]
        self.norms = [*self.norms[1 - self.BOUND_WINDOW :], norm]
        if not usual:
            return 1 / norm if norm > 0 else 1.0
        scale = statistics.median_low(usual[-self.SCALE_WINDOW :])
        bound = max(self._percentile(usual), self.LEAST_BOUND * scale)
        return bound / max(norm, bound) / scale

    def _percentile(self, norms):
        """Rounded down to one of the norms: the largest of up to 100 never counts, since it may be an outlier."""
        return sorted(norms)[int(self.PERCENTILE * (len(norms) - 1))]

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state):
        self.norms = state["norms"]


@dataclass
class Optimization:
    """The parameters of the adapter, and what changes them.

    Attributes:
        trainable: the parameters.
        optimizer, lr_scheduler: prepared by accelerate.
        clipping: `GradientClipping`.
        ema: diffusers' `EMAModel` of the parameters, or `None`.
        skipped: how many steps in a row were skipped up to now, because their gradient was not finite.
    """

    trainable: list
    optimizer: Any
    lr_scheduler: Any
    clipping: GradientClipping
    ema: Optional[EMAModel]
    skipped: int = 0


def images_of_a_step(args, accelerator):
    """Images per optimizer step, of all ranks."""
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def make_optimization(args, accelerator, trainable):
    """`Optimization` as the flags describe it."""
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as AdamW
    else:
        from torch.optim import AdamW
    optimizer = AdamW(
        trainable,
        lr=args.learning_rate * (images_of_a_step(args, accelerator) if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    # accelerate's scheduler takes one step for every process at each call.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    optimizer, lr_scheduler = accelerator.prepare(optimizer, lr_scheduler)
    ema = None if args.ema_decay is None else EMAModel(trainable, decay=args.ema_decay)
    return Optimization(trainable, optimizer, lr_scheduler, GradientClipping(args.max_grad_norm), ema)


def loss_scale(accelerator):
    """The factor by which cotangents are enlarged so that half precision can hold them; 1 except in fp16.

    The sweep is linear in its cotangents, and the optimizer's wrapper divides the gradients by the same factor.
    """
    if accelerator.scaler is None:
        return 1.0
    # The scaler has no scale before it has scaled something.
    return accelerator.scaler.scale(torch.ones((), device=accelerator.device)).item()


def average_gradients(accelerator, trainable):
    """Average the gradients over the ranks, and take out the loss scale; returns their norm."""
    for p in trainable:
        if p.grad is None:  # of a transformer that was not called at any step that was swept
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in trainable]
    vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
    return accelerator.clip_grad_norm_(trainable, math.inf).item()


def optimizer_step(accelerator, optimization):
    """Average, clip and apply the gradients, then clear them; returns their norm before clipping.

    A step whose gradient is not finite is skipped with a warning.

    Raises:
        RunError: if it is the tenth in a row.
    """
    grad_norm = average_gradients(accelerator, optimization.trainable)
    is_finite = math.isfinite(grad_norm)
    optimization.skipped = 0 if is_finite else optimization.skipped + 1
    if is_finite:
        torch._foreach_mul_([p.grad for p in optimization.trainable], optimization.clipping.factor(grad_norm))
    else:
        report_skipped(accelerator, grad_norm, optimization.skipped)
    if is_finite or accelerator.scaler is not None:  # the scaler skips the step itself, and halves its scale
        optimization.optimizer.step()
        increment_version(optimization.trainable)  # bitsandbytes writes past autograd
    optimization.optimizer.zero_grad()
    if is_finite and optimization.ema is not None:
        optimization.ema.step(optimization.trainable)
    return grad_norm


def report_skipped(accelerator, grad_norm, skipped):
    """Warn of a gradient that is not finite, or end the run.

    Args:
        skipped: how many in a row were not finite.

    Raises:
        RunError: from the tenth on.
    """
    problem, remedy = f"the gradient is not finite ({grad_norm})", "a smaller --learning_rate"
    if accelerator.scaler is not None:
        problem, remedy = f"float16 overflows at a loss scale of {loss_scale(accelerator):g}", "--mixed_precision bf16"
    if skipped >= MOST_SKIPPED:
        raise RunError(f"{problem}, as in the {skipped - 1} steps before: use {remedy}")
    logger.warning(f"{problem}: this step is skipped")


@contextmanager
def averaged(optimization):
    """Within it, the adapter has the values of its moving average, if there is one."""
    ema, trainable = optimization.ema, optimization.trainable
    if ema is not None:
        ema.store(trainable)
        ema.copy_to(trainable)
        increment_version(trainable)  # diffusers writes past autograd
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(trainable)
            increment_version(trainable)
