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

import functools
import itertools
import json
import logging
import os
import random
import re

import torch

from diffusers.training_utils import offload_models


logger = logging.getLogger(__name__)

ANIMALS = (
    "ant bat bear bee beetle butterfly camel cat chicken cow crab deer dog dolphin donkey duck eagle elephant fox "
    "frog giraffe goat goose gorilla hedgehog horse kangaroo lion lizard monkey mouse octopus otter owl panda "
    "penguin pig rabbit raccoon shark sheep snail snake spider squirrel swan tiger turtle whale wolf zebra"
).split()
SIMPLE_ANIMALS = [f"{'an' if animal[0] in 'aeiou' else 'a'} {animal}" for animal in ANIMALS]
ACTIVITIES = [
    f"{animal} {activity}"
    for activity in (
        *("reading a newspaper", "baking bread", "playing the violin", "rowing a boat", "watering flowers"),
        *("painting a portrait", "fixing a bicycle", "building a sandcastle", "climbing a ladder", "drinking tea"),
    )
    for animal in SIMPLE_ANIMALS
]
BUILT_IN = {"simple_animals": SIMPLE_ANIMALS, "activities": ACTIVITIES}
LEVELS = ("coarse", "mid", "fine")
MAX_EXPANSIONS = 100_000


def load_prompts(source):
    """The prompts of a built-in list by name, of a text file with one a line, or of the field "prompt" of a JSONL file.

    Files are UTF-8; with its byte order mark UTF-16 is read too, and what is neither as Windows-1252, which is said.
    Templates are expanded, see `expand`; empty lines and repeated prompts are left out, which is said too.

    Raises:
        ValueError: if `source` is neither, cannot be read, or holds no prompt; of a line, naming it.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source])
    try:
        return unique_prompts(prompt for entry in _entries(source) for prompt in expand(entry["prompt"]))
    except ValueError as error:
        raise ValueError(f"prompts {source!r}: {error}") from error


@functools.lru_cache(maxsize=1)
def load_levels(source):
    """{prompt: (coarse, mid, fine)} of those prompts of a JSONL file that have these fields.

    The levels of the diffusive chain of thought of RLR (huggingface.co/papers/2502.00639).

    Raises:
        ValueError: naming the prompt that has some of them only, or is a template.
    """
    if source in BUILT_IN or not source.endswith(".jsonl"):
        return {}
    levels = {}
    for entry in _entries(source):
        if not any(entry.get(level) for level in LEVELS):
            continue
        prompt, *others = expand(entry["prompt"])
        if not all(isinstance(entry.get(level), str) and entry[level].strip() for level in LEVELS):
            raise ValueError(f"prompts {source!r}: {prompt!r} needs all of {', '.join(LEVELS)} as texts, or none")
        if others:
            raise ValueError(f"prompts {source!r}: {entry['prompt']!r} is a template, which cannot have levels")
        levels.setdefault(prompt, tuple(entry[level].strip() for level in LEVELS))
    return levels


def _entries(source):
    """The lines of a file as dictionaries with a "prompt"."""
    if not os.path.isfile(source):
        raise ValueError(f"no such file, nor a built-in list ({', '.join(BUILT_IN)})")
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", _text(source))]
    if not lines[-1]:
        lines.pop()  # after the end of the last line
    if not source.endswith(".jsonl"):
        return [{"prompt": line} for line in lines]
    entries = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entries.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON ({error})") from error
        if not isinstance(entries[-1], dict) or not isinstance(entries[-1].get("prompt"), str):
            raise ValueError(f'line {number} is no object with a text "prompt"')
    return entries


def _text(path):
    with open(path, "rb") as file:
        content = file.read()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
        logger.warning(f"prompts {path!r}: not UTF-8 ({error.reason} at byte {error.start}), read as Windows-1252")
        return content.decode("cp1252", errors="replace")


def expand(template):
    """All prompts of a template: "a {red|blue} {cat|dog}" stands for four.

    Raises:
        ValueError: if they are more than 100,000.
    """
    parts = re.split(r"\{([^{}]*\|[^{}]*)\}", template)
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for alternatives in choices:
        count *= len(alternatives)
    if count > MAX_EXPANSIONS:
        raise ValueError(f"the template {template!r} stands for {count:,} prompts, more than {MAX_EXPANSIONS:,}")
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]


def unique_prompts(prompts):
    """The prompts in their order, without empty and repeated ones, whose number is said.

    Raises:
        ValueError: if none is left.
    """
    prompts = [prompt.strip() for prompt in prompts]
    kept = list(dict.fromkeys(filter(None, prompts)))
    if not kept:
        raise ValueError("there is no prompt")
    empty = prompts.count("")
    if len(kept) < len(prompts):
        logger.info(f"{len(kept)} prompts; left out: {empty} empty, {len(prompts) - empty - len(kept)} repeated")
    return kept


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


@torch.no_grad()
def embed(pipeline, prompts, device):
    """A prompt or B of them -> (embeddings (B, L, D),), of SDXL (embeddings, pooled embeddings (B, D'))."""
    # The pipelines return the negative prompts' after each of these, here nothing.
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return pipeline.encode_prompt(prompts, device=device, **options)[::2]


def text_encoders_of(pipeline):
    """Those that the pipeline has."""
    modules = (pipeline.components.get(name) for name in ("text_encoder", "text_encoder_2"))
    return [module for module in modules if module is not None]


class PromptEmbeds:
    """What the text encoders make of prompts, kept on the CPU, where the encoders rest between new prompts.

    Every prompt is encoded once and by itself: in a batch its last digits would depend on the other prompts.

    Args:
        encode: `encode(prompt) -> tuple of tensors (1, ...)`.
        text_encoders: the modules that it uses, which are moved to `device` for it.
        device: of the results.
        max_prompts: how many prompts are kept, the latest; those of SD 1.4 take 118 KB each in half precision, those of
            SDXL 318 KB. With more prompts than that, every batch has the encoders moved.
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
