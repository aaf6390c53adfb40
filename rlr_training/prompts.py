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
"""Where the prompts come from, and in which order training uses them."""

import functools
import itertools
import json
import logging
import math
import os
import random
import re

from diffusion_models.levels import levels_of_steps

from .display import shortened


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
DATASET_FILES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
# What `datasets` writes with save_to_disk: a Dataset, or a DatasetDict of several splits.
SAVED_DATASET, SAVED_SPLITS = "state.json", "dataset_dict.json"
DEFAULT_SPLIT = "train"  # of --dataset_split, which a Dataset without splits stands for as well


def load_prompts(source):
    """The prompts of a built-in list by name, or of a file.

    - A text file (.txt, or no ending) has one prompt a line.
    - A .jsonl file has an object with a text "prompt" a line.
    - A .json file has a list of prompts, or of such objects.

    Files are UTF-8. UTF-16 is read too if it has its byte order mark; any other text is read as Windows-1252, with a
    warning. Templates are expanded, see `expand`. Empty lines and repeated prompts are left out, with a log line.

    Raises:
        ValueError: if `source` is none of these, cannot be read, or holds no prompt. The message names the line at fault.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source])
    try:
        return unique_prompts(prompt for entry in _entries(source) for prompt in expand(entry["prompt"]))
    except ValueError as error:
        raise ValueError(f"prompts {source!r}: {error}") from error


def load_training_prompts(args):
    """The prompts of --prompts, or of the caption column of --dataset_name.

    Raises:
        ValueError: for a missing or empty file, a dataset that cannot be loaded, and a missing column.
    """
    if args.dataset_name is None:
        prompts = load_prompts("simple_animals" if args.prompts is None else args.prompts)
        levels_of(args.prompts, prompts)  # raises on every rank, before a model is loaded
        return prompts[: args.max_prompts]
    # Here and not above, since it takes a while that other runs need not wait.
    from .captions import load_captions

    return load_captions(args)


@functools.lru_cache(maxsize=1)
def load_levels(source):
    """{prompt: (coarse, mid, fine)} of those prompts of a JSONL file that have these fields.

    They are the levels of the diffusive chain of thought of RLR (huggingface.co/papers/2502.00639).

    Raises:
        ValueError: naming a prompt that has only some of them, or is a template.
    """
    if source in BUILT_IN or ending_of(source) not in (".jsonl", ".json"):
        return {}
    levels = {}
    for entry in _entries(source):
        if not any(entry.get(level) for level in LEVELS):
            continue
        prompt, *others = expand(entry["prompt"])
        if not all(isinstance(entry.get(level), str) and entry[level].strip() for level in LEVELS):
            raise ValueError(
                f"prompts {source!r}: {shortened(prompt)!r} needs all of {', '.join(LEVELS)} as texts, or none"
            )
        if others:
            template = shortened(entry["prompt"])
            raise ValueError(f"prompts {source!r}: {template!r} is a template, which cannot have levels")
        levels.setdefault(prompt, tuple(entry[level].strip() for level in LEVELS))
    return levels


def levels_of(source, prompts):
    """For each of the three levels its B prompts, or `None` where none of the prompts has levels.

    Args:
        source: of the prompts, as for `load_prompts`, or `None`.
        prompts: B of them. One without levels stands for itself at every level.

    Raises:
        ValueError: as `load_levels` does.
    """
    levels = {} if source is None else load_levels(source)
    if not any(prompt in levels for prompt in prompts):
        return None
    return [list(level) for level in zip(*(levels.get(prompt, (prompt,) * 3) for prompt in prompts))]


def conditions_of(args, prompts, embed):
    """The conditions of B prompts for a `rlr_utils.DenoisingChain`, of one step each where the prompts have levels.

    Args:
        embed: `embed(prompts) -> {name: (B, ...)}`.
    """
    levels = levels_of(args.prompts, prompts)
    if levels is None:
        return embed(prompts)
    by_level = [embed(level) for level in levels]
    return [by_level[level] for level in levels_of_steps(args.num_inference_steps, args.dcot_boundaries)]


def texts_of(source, prompts):
    """The texts that are encoded for some prompts, each once: those of their levels, or themselves.

    Args:
        source, prompts: as for `levels_of`.
    """
    levels = levels_of(source, prompts)
    return list(dict.fromkeys(prompts if levels is None else itertools.chain(*levels)))


def warn_of_long_prompts(source, prompts, tokenizer, limit):
    """Warn of prompts that are longer than the text encoder reads, with what it does not see of the first of them.

    Args:
        source: of the prompts, as for `load_prompts`, or `None`.
        prompts: all that will be encoded; `None` stands for none.
        tokenizer, limit: of the text encoder, and how many tokens it reads.
    """
    prompts = texts_of(source, list(filter(None, prompts)))
    tokens = zip(prompts, tokenizer(prompts, verbose=False).input_ids)
    long = [(prompt, ids) for prompt, ids in tokens if len(ids) > limit]
    if long:
        prompt, ids = long[0]
        logger.warning(
            f"{len(long)} of {len(prompts)} prompts are longer than {limit} tokens, which is all that the text encoder"
            f" reads: of {shortened(prompt)!r} it does not see {shortened(tokenizer.decode(ids[limit - 1 : -1]))!r}"
        )


def ending_of(path):
    """The extension of a file's name, with its dot, in small letters."""
    return os.path.splitext(path)[1].lower()


def _entries(source):
    """The prompts of a file as dictionaries with a "prompt"."""
    _check_kind(source)
    text = _text(source)
    if ending_of(source) == ".json":
        numbered = enumerate(_json_list(text), 1)
        return [_entry({"prompt": one} if isinstance(one, str) else one, f"entry {i}", source) for i, one in numbered]
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    if not lines[-1]:
        lines.pop()  # after the end of the last line
    if ending_of(source) == ".jsonl":
        return [_entry(_json_line(line, i), f"line {i}", source) for i, line in enumerate(lines, 1) if line]
    for kind, start in ((".json", text), (".jsonl", next(filter(None, lines), ""))):
        if _holds_json(start):
            raise ValueError(f"it is JSON and no text with one prompt a line: name it {kind}")
    return [{"prompt": line} for line in lines]


def _check_kind(source):
    if os.path.isdir(source):
        raise ValueError(f"it is a folder; {_dataset_remedy(source)}")
    if not os.path.isfile(source):
        raise ValueError(f"no such file, nor a built-in list ({', '.join(BUILT_IN)})")
    if ending_of(source) not in ("", ".txt", ".jsonl", ".json"):
        remedy = f"; {_dataset_remedy(source)}" if ending_of(source) in DATASET_FILES else ""
        raise ValueError(f"prompts are in .txt files (one a line), .json or .jsonl files{remedy}")


def _dataset_remedy(source):
    return f"to train on a column of a dataset use --dataset_name {source} --caption_column NAME"


def _json_list(text):
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}); name it .jsonl if it has an object a line") from error
    if not isinstance(content, list):
        raise ValueError('it is not a list of prompts, or of objects with a text "prompt"')
    return content


def _json_line(line, number):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from error


def _entry(entry, place, source):
    """The object of a JSON file, if it has a prompt."""
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return entry
    texts = [name for name, value in entry.items() if isinstance(value, str)] if isinstance(entry, dict) else []
    remedy = f", only {', '.join(map(repr, texts))}; {_dataset_remedy(source)}" if texts else ""
    raise ValueError(f'{place} is not an object with a text "prompt"{remedy}')


def _holds_json(text):
    """Whether a text is a JSON list or object, as no prompt is."""
    try:
        return isinstance(json.loads(text), (list, dict))
    except ValueError:
        return False


def _text(path):
    with open(path, "rb") as file:
        content = file.read()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16")
    control = re.search(rb"[\x00-\x08\x0e-\x1f]", content)
    if control is not None:
        raise ValueError(f"not a text: byte {control.start()} is a control character")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        logger.warning(f"prompts {path!r}: not UTF-8 ({error.reason} at byte {error.start}), read as Windows-1252")
        return content.decode("cp1252", errors="replace")


def expand(template):
    """All prompts of a template: "a {red|blue} {cat|dog}" stands for four, "a {very |}old cat" for two.

    Braces without a bar between them are kept as they are.

    Raises:
        ValueError: if they are more than 100,000, or a brace with a bar lacks its other, or braces are nested.
    """
    parts = re.split(r"\{([^{}]*\|[^{}]*)\}", template)
    if re.search(r"\{[^{}]*\||\|[^{}]*\}", "|".join(parts[::2])):
        raise ValueError(
            f"the template {shortened(template)!r} has a brace too many or too few: alternatives are written"
            ' "{red|blue}", and never within others'
        )
    choices = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    count = math.prod(len(alternatives) for alternatives in choices)
    if count > MAX_EXPANSIONS:
        raise ValueError(
            f"the template {shortened(template)!r} stands for {count:,} prompts, more than {MAX_EXPANSIONS:,}"
        )
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]


def unique_prompts(prompts):
    """The prompts in their order, without empty and repeated ones, whose number is logged.

    Raises:
        ValueError: if none is left.
    """
    prompts = [prompt.strip() for prompt in prompts]
    kept = list(dict.fromkeys(filter(None, prompts)))
    if not kept:
        raise ValueError("there is no prompt: one a line is needed")
    empty = prompts.count("")
    if len(kept) < len(prompts):
        logger.info(f"{len(kept)} prompts; left out: {empty} empty, {len(prompts) - empty - len(kept)} repeated")
    return kept


class PromptSampler:
    """Endless shuffled passes over the prompts. Every rank draws other prompts, and a resumed run continues the pass.

    Args:
        prompts: list of strings.
        seed: the order of pass n depends on (seed, n) alone, so that `position` is the whole state.
        rank, num_ranks: this process and how many there are; each batch is `num_ranks` consecutive slices.
        images_per_prompt: how often each prompt of a pass comes in a row.
    """

    def __init__(self, prompts, seed, rank=0, num_ranks=1, images_per_prompt=1):
        self.prompts = prompts
        self.num_distinct = len(set(prompts))
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
