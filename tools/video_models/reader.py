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
"""Train the network that reads digits and colors from frames, independent of the models that draw them."""

import functools
import os
import runpy

import torch
import torch.nn.functional as F
from emoji_models.training import fit
from safetensors.torch import save_file


NOISE = 0.08  # standard deviation of the noise on a frame, at most


def reader_code(out):
    """The names of video_reader.py, which lies with its weights, as a dictionary."""
    return runpy.run_path(os.path.join(out, "tiny-wan-rewards", "video_reader.py"))


def train_reader(digits, state_file, steps, out, batch_size=64):
    """Train on real frames, with more or less noise; saves the weights beside video_reader.py."""
    torch.manual_seed(3)
    reader = reader_code(out)["DigitReader"]()

    def loss(generator):
        batch = digits.batch(batch_size, generator, num_frames=1)
        level = NOISE * torch.rand(batch_size, 1, 1, 1, generator=generator)
        images = batch.videos[:, 0] + level * torch.randn(batch.videos[:, 0].shape, generator=generator)
        digit, color = reader(images.clamp(0, 1))
        losses = {"digit": F.cross_entropy(digit, batch.digits), "color": F.cross_entropy(color, batch.colors)}
        return sum(losses.values()), losses

    reader = fit(reader, loss, steps, 2e-3, seed=3, state_file=state_file, weight_decay=1e-2)
    weights = {name: tensor.half() for name, tensor in reader.state_dict().items()}
    save_file(weights, os.path.join(out, "tiny-wan-rewards", "video_reader.safetensors"))


@functools.cache
def load_reader(out):
    """(the trained network, the names of video_reader.py)."""
    code = reader_code(out)
    return code["load_reader"](), code


@torch.no_grad()
def read(videos, out):
    """Videos (B, F, 3, 32, 32) in [0, 1] -> indices of the digits (B, F), the colors (B, F) and the motions (B,)."""
    reader, code = load_reader(out)
    digits, colors = zip(*(code["read_frames"](reader, some) for some in videos.split(50)))
    return torch.cat(digits), torch.cat(colors), code["read_directions"](videos)


def accuracies(batch, out):
    """The shares of a batch's digits, colors (both by frame) and motions that are read right from its videos."""
    digits, colors, motions = read(batch.videos, out)
    pairs = (digits, batch.digits[:, None]), (colors, batch.colors[:, None]), (motions, batch.motions)
    return [(found == true).float().mean().item() for found, true in pairs]
