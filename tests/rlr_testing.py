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
"""Chains with known answers, and the embedded bundle, for the tests."""

import json
import os

import torch
from gradient_quality import LinearGaussianChain, flat_gradient  # noqa: F401
from safetensors.torch import load_file
from train_rlr_sd import main, parse_args

from diffusers import StableDiffusionPipeline


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ASSETS = os.path.join(ROOT, "assets")
TINY_SD = os.path.join(ASSETS, "tiny-sd")
TINY_AESTHETIC = os.path.join(ASSETS, "tiny-aesthetic")
TINY_CLIP = os.path.join(TINY_AESTHETIC, "clip")
LORA = "pytorch_lora_weights.safetensors"
DIGITS = os.path.join(ASSETS, "digits.txt")
PARITY = os.path.join(os.path.dirname(ROOT), "shared", "data", "parity")
BASE = [
    *("--pretrained_model_name_or_path", TINY_SD, "--prompts", DIGITS),
    *("--reward_path", f"aesthetic={TINY_AESTHETIC}"),
    *("--reward_path", f"clip_score={TINY_CLIP}"),
    *("--num_inference_steps", "3", "--train_batch_size", "2", "--max_train_steps", "2", "--seed", "0"),
    *("--num_eval_images", "0", "--report_to", "none"),
]


class NonlinearChain(torch.nn.Module):
    """A small network for every mean, so that nothing is linear: for comparisons with autograd."""

    def __init__(self, num_steps=5, dim=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.num_steps = num_steps
        self.net = torch.nn.Sequential(torch.nn.Linear(dim + 1, 8), torch.nn.Tanh(), torch.nn.Linear(8, dim)).double()

    def sigma(self, k):
        return 0.1 + 0.05 * k

    def mean(self, k, x):
        step = torch.full_like(x[:, :1], k / self.num_steps)
        return 0.8 * x + self.net(torch.cat([x, step], dim=1))


class Mix(torch.autograd.Function):
    """c_{k-1} = gamma c^P + (1 - gamma) c^L in one graph of the chain: a node that mixes what comes back through it."""

    @staticmethod
    def forward(ctx, x, gamma, score):
        ctx.gamma, ctx.score = gamma, score
        return x.clone()

    @staticmethod
    def backward(ctx, pathwise):
        return ctx.gamma * pathwise + (1 - ctx.gamma) * ctx.score, None, None


def gradients(module):
    """All gradients of a module as one vector, which are cleared."""
    return flat_gradient([p for p in module.parameters() if p.requires_grad])


def tiny_pipeline(dtype=torch.float32):
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(output_dir, *flags):
    main(parse_args([*BASE, "--output_dir", str(output_dir), *flags]))
    return metrics_of(output_dir)


def same_adapter(a, b):
    """Whether two runs ended in bitwise the same weights; the files differ in the order of their metadata."""
    first, second = load_file(a / LORA), load_file(b / LORA)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
