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
"""Where the prompts come from, in which order training meets them, and what the text encoder makes of them."""

import os
import random

import torch

from diffusers.training_utils import offload_models


SIMPLE_ANIMALS = [
    f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}"
    for animal in (
        "ant bat bear bee beetle butterfly camel cat chicken cow crab deer dog dolphin donkey duck eagle elephant fox "
        "frog giraffe goat goose gorilla hedgehog horse kangaroo lion lizard monkey mouse octopus otter owl panda "
        "penguin pig rabbit raccoon shark sheep snail snake spider squirrel swan tiger turtle whale wolf zebra"
    ).split()
]
BUILT_IN = {"simple_animals": SIMPLE_ANIMALS}


def load_prompts(source):
    """The prompts of a built-in list by name, or of a text file with one prompt a line (UTF-8, empty lines skipped).

    Raises:
        ValueError: if `source` is neither, cannot be read as UTF-8, or holds no prompt.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source])
    if not os.path.isfile(source):
        raise ValueError(f"prompts {source!r}: no such file, nor a built-in list ({', '.join(BUILT_IN)})")
    try:
        with open(source, encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts {source!r}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not prompts:
        raise ValueError(f"prompts {source!r}: the file holds no prompt")
    return prompts


class PromptSampler:
    """Endless shuffled passes over the prompts; every rank draws other ones, and a run resumes where it was.

    Args:
        prompts: list of strings.
        seed: the order of pass n depends on (seed, n) alone, so that `position` is the whole state.
        rank, num_ranks: this process and how many there are; each batch is `num_ranks` consecutive slices.
        images_per_prompt: how often each prompt of a pass comes in a row.
    """

    def __init__(self, prompts, seed, rank=0, num_ranks=1, images_per_prompt=1):
        self.prompts = prompts
        self.seed = seed
        self.rank = rank
        self.num_ranks = num_ranks
        self.images_per_prompt = images_per_prompt
        self.position = 0
        self._pass, self._order = None, None

    def next_batch(self, batch_size):
        """The next `batch_size` prompts of this rank."""
        start = self.position + self.rank * batch_size
        self.position += self.num_ranks * batch_size
        return [self._at(position) for position in range(start, start + batch_size)]

    def _at(self, position):
        number, index = divmod(position // self.images_per_prompt, len(self.prompts))
        if number != self._pass:
            self._pass, self._order = number, list(self.prompts)
            random.Random(f"{self.seed}/{number}").shuffle(self._order)
        return self._order[index]


class PromptEmbeds:
    """What the text encoders make of prompts, kept on the CPU, where the encoders rest between new prompts.

    Every prompt is encoded once and by itself: in a batch its last digits would depend on the other prompts.

    Args:
        encode: `encode(prompt) -> tuple of tensors (1, ...)`.
        text_encoders: the modules that it uses, which are moved to `device` for it.
        device: of the results.
        max_prompts: how many prompts are kept; those of SD 1.4 take 118 KB each in half precision.
    """

    def __init__(self, encode, text_encoders, device, max_prompts=4096):
        self.encode = encode
        self.text_encoders = [module.cpu() for module in text_encoders]
        self.device = device
        self.max_prompts = max_prompts
        self.kept = {}

    @torch.no_grad()
    def __call__(self, prompts):
        """B prompts -> a tuple of tensors (B, ...)."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        if new:
            with offload_models(*self.text_encoders, device=self.device):
                self.kept.update({prompt: [part.cpu() for part in self.encode(prompt)] for prompt in new})
        embeds = tuple(torch.cat(parts).to(self.device) for parts in zip(*(self.kept[prompt] for prompt in prompts)))
        for prompt in list(self.kept)[: -self.max_prompts]:
            del self.kept[prompt]
        return embeds
