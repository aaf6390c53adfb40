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
"""Fine-tune a LoRA of Stable Diffusion 1.x, 2.x or XL on a reward with RLR (huggingface.co/papers/2502.00639).

    accelerate launch train_rlr_sd.py --reward aesthetic

prompt -> rollout -> reward -> advantages -> sweep -> optimizer step; see the README beside this file.
"""

import time

from diffusion_models import UNET_FAMILIES
from diffusion_models.levels import BOUNDARIES
from diffusion_models.schedulers import SCHEDULERS
from rlr_training import arguments, reward_flags, sampling
from rlr_training.errors import errors_in_one_line, naming
from rlr_training.flags import FlagParser


SCRIPT, TRACKER = "train_rlr_sd.py", "rlr-sd"


def parse_args(input_args=None):
    parser = FlagParser(prog=SCRIPT, description="Fine-tune a LoRA of Stable Diffusion 1.x, 2.x or XL on a reward.")
    model = arguments.add_model_flags(
        *(parser, "CompVis/stable-diffusion-v1-4"),
        files=", or a .safetensors file of SD 1.x or XL",
        lora_layers="to_k,to_q,to_v,to_out.0",
    )
    model.add_argument(
        "--pretrained_vae_model_name_or_path",
        help="A VAE instead of the model's own (folder or Hub name). For SDXL, madebyollin/sdxl-vae-fp16-fix runs in half"
        " precision, where the model's own stays in float32.",
    )
    group = sampling.add_sampling_flags(parser, num_inference_steps=50, guidance_scale=5.0)
    sampling.add_scheduler_flags(group, SCHEDULERS)
    reward_flags.add_reward_flags(parser)
    arguments.add_estimator_flags(parser)
    arguments.add_paper_flags(parser)
    reward_flags.add_hacking_flags(parser)
    arguments.add_prompt_flags(parser, BOUNDARIES)
    arguments.add_validation_flags(parser)
    arguments.add_training_flags(parser, "rlr-sd-lora")
    arguments.add_saving_flags(parser).add_argument(
        "--export_kohya",
        action="store_true",
        help="Also write the final adapter in the layout of kohya, which ComfyUI and AUTOMATIC1111 load.",
    )
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

    run = prepare(args, SCRIPT, TRACKER, UNET_FAMILIES, defaults=parse_args([]))
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
    """Entry point of `rlr-train-sd`."""
    main(parse_args())


if __name__ == "__main__":
    cli()
