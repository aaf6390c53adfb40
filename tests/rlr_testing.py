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
"""The embedded models, and runs of the training script on them, for the tests."""

import json
import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusion_models import load_model
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


def tiny_pipeline(dtype=torch.float32):
    """The embedded pipeline as diffusers loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(TINY_SD, dtype=dtype, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_model(**options):
    """The embedded pipeline as `DiffusionModel`."""
    return load_model(TINY_SD, **options)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def forget_accelerator():
    """Forget the accelerator of an earlier run in this process, which may have had another precision."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(output_dir, *flags):
    forget_accelerator()
    main(parse_args([*BASE, "--output_dir", str(output_dir), *flags]))
    return metrics_of(output_dir)


def refused(output_dir, capsys, *flags):
    """The message of a run that ends in an error without having written anything."""
    with pytest.raises(SystemExit) as stop:
        train(output_dir, *flags)
    assert stop.value.code not in (0, None)
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message.strip().count("\n") == 0 and message.startswith("train_rlr_sd.py: error: ")
    assert not output_dir.exists()
    return message


def same_adapter(a, b):
    """Whether two runs ended in bitwise the same weights; the files differ in the order of their metadata."""
    first, second = load_file(a / LORA), load_file(b / LORA)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@contextmanager
def widened_norms():
    """Within it, normalisations under autocast are in float32, as on a GPU; on a CPU autocast leaves them alone."""

    def widened(norm):
        def wide(*args, **kwargs):
            is_autocast = torch.is_autocast_enabled("cpu")
            return norm(*(a.float() if is_autocast and isinstance(a, torch.Tensor) else a for a in args), **kwargs)

        return wide

    with patch.object(F, "group_norm", widened(F.group_norm)), patch.object(F, "layer_norm", widened(F.layer_norm)):
        yield
