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
"""What an emoji shows, read by a small convolutional network: its concept, style and background.

`ConceptAccuracy` is a custom reward for `--heldout_reward`: does an image still show what its prompt asks for?
"""

import json
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


FOLDER = os.path.dirname(os.path.abspath(__file__))
RESOLUTION = 48
STYLES = ["cartoon", "3d"]
BACKGROUNDS = ["white", "blue", "green", "yellow", "pink", "purple"]


def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()]


class EmojiClassifier(nn.Module):
    """Images (B, 3, 48, 48) in [0, 1] -> logits of the concept (B, C), the style (B, 2) and the background (B, 6)."""

    def __init__(self, num_concepts):
        super().__init__()
        self.sizes = [num_concepts, len(STYLES), len(BACKGROUNDS)]
        self.features = nn.Sequential(
            *block(3, 32),
            *(*block(32, 32), nn.MaxPool2d(2)),
            *(*block(32, 64), nn.MaxPool2d(2)),
            *(*block(64, 96), nn.MaxPool2d(2)),
            *block(96, 128),
        )
        self.head = nn.Linear(2 * 128, sum(self.sizes))

    def forward(self, images):
        features = self.features(2 * images - 1)
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.head(pooled).split(self.sizes, 1)


def load_classifier():
    """The trained classifier, and the words for its concepts."""
    with open(os.path.join(FOLDER, "emoji_classifier.json"), encoding="utf-8") as file:
        concepts = json.load(file)
    classifier = EmojiClassifier(len(concepts))
    state = load_file(os.path.join(FOLDER, "emoji_classifier.safetensors"))
    classifier.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return classifier.eval().requires_grad_(False), concepts


class ConceptAccuracy(nn.Module):
    """1 for an image that shows the concept of its prompt, 0 for another: a black box."""

    def __init__(self):
        super().__init__()
        self.classifier, self.concepts = load_classifier()

    def concept_in(self, prompt):
        """The index of the concept that a prompt names.

        Raises:
            ValueError: It names none, or more than one.
        """
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        named = [index for index, concept in enumerate(self.concepts) if concept in words]
        if len(named) != 1:
            raise ValueError(
                f"the prompt {prompt!r} names {len(named)} of the emoji that the classifier knows: name one"
            )
        return named[0]

    @torch.no_grad()
    def forward(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1] and B prompts such as "a fox" -> (B,)."""
        asked = torch.tensor([self.concept_in(prompt) for prompt in prompts], device=images.device)
        images = F.interpolate(images, (RESOLUTION, RESOLUTION), mode="bicubic", antialias=True, align_corners=False)
        concept, _, _ = self.classifier(images.clamp(0, 1))
        return (concept.argmax(1) == asked).float()
