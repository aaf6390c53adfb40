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
"""Train the network that reads concept, style and background from images, independent of CLIP."""

import functools
import json
import os
import runpy

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from .data import degrade
from .training import fit


HELD_OUT = {"shift": (3.0, 5.0), "scale": (0.7, 1.0), "tilt": 12.0}  # all shifts are beyond those of the training


def classifier_code(out):
    """The names of emoji_classifier.py, which lies with its weights, as a dictionary."""
    return runpy.run_path(os.path.join(out, "tiny-emoji-rewards", "emoji_classifier.py"))


def train_classifier(emoji, state_file, steps, out, batch_size=64):
    """Train on real images, half of them degraded; saves weights and concepts beside emoji_classifier.py."""
    torch.manual_seed(4)
    classifier = classifier_code(out)["EmojiClassifier"](len(emoji.concepts))

    def loss(generator):
        batch = emoji.batch(batch_size, generator)
        images, _ = degrade(batch.images, generator)
        wanted = (batch.concepts, batch.styles, batch.backgrounds)
        losses = [F.cross_entropy(logits, index) for logits, index in zip(classifier(images), wanted)]
        return sum(losses), dict(zip(("concept", "style", "background"), losses))

    # So few steps need no moving average.
    classifier = fit(classifier, loss, steps, 2e-3, seed=4, state_file=state_file, weight_decay=1e-2, ema_decay=0.0)
    folder = os.path.join(out, "tiny-emoji-rewards")
    weights = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
    save_file(weights, os.path.join(folder, "emoji_classifier.safetensors"))
    with open(os.path.join(folder, "emoji_classifier.json"), "w", encoding="utf-8") as file:
        json.dump(emoji.concepts, file, indent=1)
        file.write("\n")


@functools.cache
def load_classifier(out):
    """The trained classifier."""
    return classifier_code(out)["load_classifier"]()[0]


def accuracy(read_indices, indices, where=slice(None)):
    """The share of indices (N,) that were read right, of those `where` says."""
    return (read_indices[where] == indices[where]).float().mean().item()


def accuracies(batch, out):
    """The shares of a batch's concepts, styles and backgrounds that the classifier reads from its images."""
    found, true = read(batch.images, out), (batch.concepts, batch.styles, batch.backgrounds)
    return [accuracy(*pair) for pair in zip(found, true)]


@torch.no_grad()
def read(images, out):
    """Images (B, 3, 48, 48) in [0, 1] -> the indices (B,) of concept, style and background that the classifier reads."""
    classifier = load_classifier(out)
    parts = [classifier(some) for some in images.split(100)]
    return [torch.cat(logits).argmax(1) for logits in zip(*parts)]
