#!/usr/bin/env python
# coding=utf-8
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
"""Fine-tune a LoRA of a text-to-video model on a reward with RLR (huggingface.co/papers/2502.00639).

    accelerate launch train_rlr_video.py --reward aesthetic,motion

Wan 2.1 and 2.2, LTX-Video, CogVideoX and AnimateDiff. Rewards on images score every frame.

prompt -> rollout -> reward -> advantages -> sweep -> optimizer step; see the README beside this file.
"""

import time

from diffusion_models import VIDEO_FAMILIES
from diffusion_models.levels import BOUNDARIES
from rlr_training import arguments, reward_flags, sampling
from rlr_training.errors import errors_in_one_line, naming
from rlr_training.flags import FlagParser


SCRIPT, TRACKER = "train_rlr_video.py", "rlr-video"


def parse_args(input_args=None):
    parser = FlagParser(prog=SCRIPT, description="Fine-tune a LoRA of a text-to-video model on a reward.")
    sampling.add_experts_flag(arguments.add_model_flags(parser, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
    group = sampling.add_sampling_flags(parser)
    sampling.add_video_flags(group)
    sampling.add_flow_flags(group)
    sampling.add_noise_flags(group)
    sampling.add_score_frames_flag(reward_flags.add_reward_flags(parser))
    arguments.add_estimator_flags(parser)
    arguments.add_paper_flags(parser)
    reward_flags.add_hacking_flags(parser)
    arguments.add_prompt_flags(parser, BOUNDARIES)
    arguments.add_validation_flags(parser)
    arguments.add_training_flags(parser, "rlr-video-lora")
    arguments.add_saving_flags(parser)
    # Videos are large: of fewer the figures are less certain, but all of them fit into memory.
    parser.set_defaults(train_batch_size=1, gradient_accumulation_steps=4, num_eval_images=8, num_heldout_images=8)
    return arguments.parse_training_args(parser, input_args)


@errors_in_one_line(SCRIPT)
def main(args):
    # Here and not above, so that --help and errors of the command line do not wait for heavy libraries.
    from rlr_training.after_step import after_step
    from rlr_training.chains import size_of
    from rlr_training.finish import finish
    from rlr_training.metrics import Progress, gather_scores, metrics_of
    from rlr_training.optimizer import loss_scale, optimizer_step
    from rlr_training.processes import generators_of, stopping_after_a_step
    from rlr_training.run import prepare
    from rlr_training.services import checking_rewards

    run = prepare(args, SCRIPT, TRACKER, VIDEO_FAMILIES, defaults=parse_args([]))
    accelerator, rlr, size = run.accelerator, run.rlr, size_of(args)
    step, end = run.first_step, run.stopping.reason(run.first_step)
    progress = Progress(accelerator, run.first_step, args.max_train_steps)
    with stopping_after_a_step(accelerator), progress:
        while step < args.max_train_steps and end is None:
            step, started = step + 1, time.perf_counter()
            with naming(f"step {step}:"):
                # prompt -> rollout -> reward
                batches, scorers = [], []
                with checking_rewards(args, run, step):
                    for index in range(args.gradient_accumulation_steps):
                        prompts = run.sampler.next_batch(args.train_batch_size)
                        chain = run.chain_of(prompts)
                        generators = generators_of(args, accelerator, step, index)
                        x_T = run.model.draw_latents(chain, len(prompts), size, generators)
                        scorers.append(run.scorer_of(prompts))
                        batches.append(
                            rlr.rollout(
                                *(chain, x_T, scorers[-1], generators),
                                prompts=prompts,
                                score_predictions=run.prediction_scorer_of(prompts),
                            )
                        )

                # reward -> advantages -> sweep -> optimizer step
                statistics = []
                for _ in range(args.num_inner_epochs):
                    statistics.append(rlr.backward(batches, loss_scale(accelerator)))
                    grad_norm = optimizer_step(accelerator, run.optimization)
                run.optimization.lr_scheduler.step()

                # log, checkpoint, validate
                scores, seconds = gather_scores(accelerator, scorers), time.perf_counter() - started
                learning_rate = run.optimization.lr_scheduler.get_last_lr()[0]
                line = metrics_of(step, scores, statistics, grad_norm, learning_rate, seconds)
                end = after_step(args, run, step, line, progress)
    finish(args, run, step, end)


def cli():
    """Entry point of `rlr-train-video`."""
    main(parse_args())


if __name__ == "__main__":
    cli()
