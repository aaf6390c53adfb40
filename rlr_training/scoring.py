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
"""The rewards of latents: decoded and scored, a few images at a time."""

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from reward_models import load_rewards, parse_reward, parse_reward_options, parse_reward_paths
from rlr_utils.kept_graphs import spare_bytes

from diffusers.training_utils import free_memory, offload_models

from .chains import size_of
from .errors import RunError
from .memory import LiveBytes
from .offload import decoding
from .optimizer import loss_scale


logger = get_logger(__name__, log_level="INFO")

# --score_frames for one random chunk of the frames that the decoder gives together.
CHUNK = "chunk"
# More images at a time keep no GPU busier.
MOST_DECODED = 16


def load_reward_sum(args, text, prompts, device, batch_size):
    """The reward or sum `text`, with the folders of --reward_path, for images of the size that `set_size` has set.

    Args:
        prompts: of the run, which the rewards must be able to score; custom ones are tried on the first and the last.
        batch_size: images that a reward scores at a time.

    Raises:
        ValueError: as `reward_models.load_rewards` does.
    """
    rewards = load_rewards(
        parse_reward(text),
        parse_reward_paths(args.reward_path),
        options=parse_reward_options(args.reward_option),
        device=device,
        size=size_of(args),
        prompts=(prompts[0], prompts[-1]),
        batch_size=batch_size,
        frame_reduction=getattr(args, "frame_reduction", "mean"),
        fps=getattr(args, "fps", None),
    )
    rewards.check_prompts([*prompts, *(getattr(args, "validation_prompts", None) or [])])
    for service in rewards.services:
        service.patience = getattr(args, "reward_timeout", service.patience)
    return rewards


def check_score_frames(args, model, rewards):
    """Refuse a --score_frames that the model or the reward has not.

    Raises:
        ValueError: naming it.
    """
    chosen = getattr(args, "score_frames", "all")
    if chosen == CHUNK and model.chunk_frames(args.num_frames) is None:
        raise ValueError(
            f"--score_frames {CHUNK} needs a decoder that can be stopped, and that of a {model.pipeline_class} decodes"
            " videos as a whole: use --score_frames all"
        )
    if chosen == CHUNK and rewards.floors:
        raise ValueError(
            f"--score_frames {CHUNK} and --reward_floor: the penalty of a mean is not the mean of penalties; use --score_frames all"
        )
    if chosen == CHUNK and not rewards.mean_over_frames:
        raise ValueError(
            f"--score_frames {CHUNK} is for rewards that are means over frames, and --reward {args.reward!r} with"
            f" --frame_reduction {args.frame_reduction} is none: use --score_frames all"
        )
    timed = [name for name, (_, reward) in rewards.members.items() if hasattr(reward, "fps")]
    if isinstance(chosen, int) and timed:
        raise ValueError(
            f"--score_frames {chosen} changes the frame rate, on which the reward {timed[0]!r} depends: use --score_frames all"
        )
    if isinstance(chosen, int) and chosen > args.num_frames:
        raise ValueError(f"--score_frames {chosen} is more than the {args.num_frames} frames of a video")


def decoder_of(args, model):
    """`decode(latents, vae) -> images` in [0, 1], or for videos those of their frames that --score_frames scores.

    A chunk is drawn with a probability p in proportion to the number n of its frames. For the mean of F scores r_f the
    estimate is sum_f r_f / (F p) over its frames, which is their mean, since p = n / F.
    """
    chosen = getattr(args, "score_frames", "all")
    if chosen == "all":
        return model.decode
    if chosen != CHUNK:
        kept = torch.linspace(0, args.num_frames - 1, chosen).round().long()
        return lambda latents, vae: model.decode(latents, vae)[:, kept.to(latents.device)]
    lengths = torch.tensor(model.chunk_frames(args.num_frames), dtype=torch.float)
    return lambda latents, vae: model.decode_chunk(latents, torch.multinomial(lengths, 1).item())


def settle_batch_sizes(args, model, sums, prompt):
    """Set --decode_batch_size where it is auto, and how many images the rewards score at a time where no flag says it.

    Args:
        model: `DiffusionModel`, on the device.
        sums: each `WeightedSum` of the run, the first of which is trained for.
        prompt: any.

    Returns:
        Bytes that one image takes while it is decoded and scored.
    """
    device, rewards = model.network.device, sums[0]
    with decoding(args, model, device), offload_models(*rewards.modules, device=device, offload=args.reward_offload):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        taken = score_one(args, model, rewards, prompt)
        fitting = images_that_fit(taken, spare_bytes(device))
    if args.decode_batch_size == "auto":
        args.decode_batch_size = min(gather_object([fitting]))
    for one in sums:
        one.batch_size = one.batch_size or args.decode_batch_size
    return taken


def score_one(args, model, rewards, prompt):
    """Decode and score some image or video, with its gradient if there is one; returns the bytes that this takes."""
    latents = torch.zeros(model.latents_shape(1, size_of(args)), device=model.network.device)
    with LiveBytes() as live:
        score_latents(decoder_of(args, model), rewards, latents, [prompt], 1, rewards.has_gradient)
    return live.peak


def images_that_fit(taken, spare):
    """How many images of so many bytes are decoded at a time: one, and as many as fit into half of what it leaves spare."""
    return min(MOST_DECODED, 1 + int(max(0, spare) / 2 / taken))


def score_latents(decode, rewards, latents, prompts, decode_batch_size, with_gradient=False, scale=1.0, vae=None):
    """Decode latents (B, ...) and score the images or videos, a few at a time.

    Args:
        decode: `decode(latents, vae)`, see `decoder_of`.
        rewards: `WeightedSum`.
        scale: of the cotangents while they pass through the decoder, see `loss_scale`; the result is free of it.
        vae: decodes instead of the model's own.

    Returns:
        scores: {"total", "black_box", member names...} -> (B,).
        reward_grad: (B, ...), the gradient of the differentiable part with respect to the latents, or `None`.
    """
    scores, reward_grad = [], []
    for start in range(0, len(latents), decode_batch_size):
        x_0 = latents[start : start + decode_batch_size].detach().requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            images = decode(x_0, vae)
        result = rewards(images, prompts[start : start + decode_batch_size], with_gradient)
        if with_gradient:
            reward_grad += [g / scale for g in torch.autograd.grad(images, x_0, scale * result.gradient)]
        scores.append({"total": result.total, "black_box": result.black_box, **result.members})
    scores = {name: torch.cat([part[name] for part in scores]) for name in scores[0]}
    return scores, torch.cat(reward_grad) if with_gradient else None


class BatchScorer:
    """The `score` of `RLRStep.rollout` for a batch of prompts.

    Args:
        args: of the script, for --decode_batch_size and --reward_offload.
        accelerator: whose loss scale protects the gradient in float16.
        model: `DiffusionModel`.
        rewards: `WeightedSum`.
        prompts: B of them; of latents (S B, ...) image i has the prompt i mod B.
        vae: decodes instead of the model's own.

    Attributes:
        scores: {"total", member names...} -> (B,) of the first latents that were scored, where the rollout ended.

    Raises:
        RunError: when a reward fails.
    """

    def __init__(self, args, accelerator, model, rewards, prompts, vae=None):
        self.args, self.accelerator, self.model, self.rewards = args, accelerator, model, rewards
        self.decode, self.prompts, self.vae = decoder_of(args, model), prompts, vae
        self.scores = None

    def __call__(self, x_0, with_gradient):
        while True:
            try:
                scores, reward_grad = self._score(x_0, with_gradient)
            except ValueError as error:
                raise RunError(str(error)) from error
            except torch.OutOfMemoryError:
                if self.args.decode_batch_size == 1:
                    raise
            else:
                break
            self._halve()
        black_box = scores.pop("black_box")
        self.scores = scores if self.scores is None else self.scores
        if self.rewards.differentiable:
            return scores["total"], reward_grad
        return scores["total"], reward_grad, black_box

    def _score(self, x_0, with_gradient):
        args, device, scale = self.args, self.accelerator.device, loss_scale(self.accelerator)
        prompts = self.prompts * (len(x_0) // len(self.prompts))
        with (
            decoding(args, self.model, device, self.vae),
            offload_models(*self.rewards.modules, device=device, offload=args.reward_offload),
        ):
            return score_latents(
                *(self.decode, self.rewards, x_0, prompts, args.decode_batch_size, with_gradient, scale), vae=self.vae
            )

    def _halve(self):
        """Decode and score half as many images at a time from now on."""
        self.args.decode_batch_size //= 2
        self.rewards.batch_size = min(self.rewards.batch_size or 1, self.args.decode_batch_size)
        logger.warning(f"out of memory: from now on --decode_batch_size {self.args.decode_batch_size}")
        free_memory()
