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
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import torch
from accelerate.logging import get_logger
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from .errors import RunError


logger = get_logger(__name__, log_level="INFO")

# The loss scale starts at 2^10 and is halved at each overflow: where it gets here, the scale is not the problem.
SMALLEST_LOSS_SCALE = 2.0**-10


class GradientClipping:
    """What the gradient of an optimizer step is multiplied by: it is clipped to a norm that is given or learned.

    A reward has a unit of its own, and so has its gradient: no fixed norm fits an aesthetic score, a file size and a
    cosine. And gradients through a chain are heavy-tailed, so that Adam's second moments would remember an outlier for a
    thousand steps. With "auto" the limit is the 10th percentile of the norms so far (AutoClip,
    huggingface.co/papers/2007.14469), without those that are negligible: where all rewards of a batch are equal, as with a
    rare success, its gradient is 0 up to rounding. The gradient is also divided by the limit, so that a clipped gradient has
    norm 1: an outlier among the first batches sets the percentile itself, and would else weigh more in the second moments
    than any later batch.

    Args:
        max_norm: the largest norm, or "auto".
    """

    def __init__(self, max_norm):
        self.max_norm, self.norms = max_norm, []

    def factor(self, norm):
        """What a gradient of this norm is to be multiplied by; 1 where the norm is 0 or not finite. "auto" learns the norm."""
        if self.max_norm != "auto":
            return self.max_norm / max(norm, self.max_norm)
        if not math.isfinite(norm):  # float16 has overflowed, and the step is skipped
            return 1.0
        self.norms.append(norm)
        norms = torch.tensor(self.norms, dtype=torch.float64)
        norms = norms[norms > 1e-3 * max(self.norms)]
        return 1.0 / max(norm, norms.quantile(0.1).item()) if len(norms) > 0 else 1.0

    def state_dict(self):
        return {"norms": self.norms}

    def load_state_dict(self, state):
        self.norms = state["norms"]


class Optimization(NamedTuple):
    """The parameters of the adapter, and what changes them.

    Attributes:
        trainable: the parameters.
        optimizer, lr_scheduler: prepared by accelerate.
        clipping: `GradientClipping`.
        ema: diffusers' `EMAModel` of the parameters, or `None`.
    """

    trainable: list
    optimizer: Any
    lr_scheduler: Any
    clipping: GradientClipping
    ema: Optional[EMAModel]


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


def average_gradients(accelerator, trainable, clipping):
    """Average the gradients over the ranks and clip them; returns their norm before clipping.

    Raises:
        RunError: for a gradient that is not finite. In fp16 the step is skipped instead, until the loss scale is tiny.
    """
    gradients = [p.grad for p in trainable]
    vector_to_parameters(accelerator.reduce(parameters_to_vector(gradients), "mean"), gradients)
    grad_norm = accelerator.clip_grad_norm_(trainable, math.inf).item()  # which takes out the loss scale
    if not math.isfinite(grad_norm):
        if accelerator.scaler is None:
            raise RunError(f"the gradient is not finite ({grad_norm})")
        scale = loss_scale(accelerator)
        if scale < SMALLEST_LOSS_SCALE:
            raise RunError(f"float16 overflows even at a loss scale of {scale:g}: use --mixed_precision bf16 or no")
        logger.warning(
            f"float16 overflows at a loss scale of {scale:g}: this step is skipped, the next has half of it"
        )
    torch._foreach_mul_(gradients, clipping.factor(grad_norm))
    return grad_norm


def optimizer_step(accelerator, optimization):
    """Average, clip and apply the gradients, then clear them; returns their norm before clipping.

    Raises:
        RunError: as `average_gradients` does.
    """
    grad_norm = average_gradients(accelerator, optimization.trainable, optimization.clipping)
    optimization.optimizer.step()
    optimization.optimizer.zero_grad()
    if optimization.ema is not None:
        optimization.ema.step(optimization.trainable)
    return grad_norm


@contextmanager
def averaged(optimization):
    """Within it, the adapter has the values of its moving average, if there is one."""
    ema, trainable = optimization.ema, optimization.trainable
    if ema is not None:
        ema.store(trainable)
        ema.copy_to(trainable)
    try:
        yield
    finally:
        if ema is not None:
            ema.restore(trainable)
