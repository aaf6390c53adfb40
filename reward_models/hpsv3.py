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
"""HPSv3: human preference of images, a fine-tuned Qwen2-VL-7B with a head. huggingface.co/papers/2508.03789"""

import importlib.util
import os

import torch
from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from .loading import (
    existing_file,
    has_file,
    hub_file,
    load_into,
    load_pretrained,
    load_state_dict,
    one_line_errors,
    read_texts,
    rename_keys,
)
from .vision_language import QWEN2_VL_CHAT, QWEN2_VL_NAMES, OneByOne, Patches, base_of, check_special_tokens


MODEL_ID, BASE_ID, CHECKPOINT = "MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct", "HPSv3.safetensors"
TEXT_FILE, TEXTS = "data_collator_qwen.py", ("INSTRUCTION", "prompt_with_special_token")
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
TOKENS = 256  # of a square image, whatever its size; of others there are a few less or more


def make_head(width):
    """The head of the original: states (N, width) -> (N, 2), the mean of the score and the logarithm of its deviation."""
    linear, relu = torch.nn.Linear, torch.nn.ReLU
    return torch.nn.Sequential(
        linear(width, 1024), relu(), torch.nn.Dropout(0.05), linear(1024, 16), relu(), linear(16, 2)
    )


class HPSv3(OneByOne):
    """R = mu of (mu, log sigma) = head(h), where h is the network's state at the token that asks for the rating.

    The original resizes images of 8 bits and rounds the result. Here neither is rounded, so that the score has a gradient.

    Args:
        network: Qwen2VLModel.
        head: from `make_head`, in float32 or wider.
        tokenizer: has `REWARD_TOKEN`.
        instruction, request: the texts that the network was trained with, before and after the prompt.
    """

    def __init__(self, network, head, tokenizer, instruction, request):
        super().__init__()
        self.network, self.head, self.tokenizer = network, head, tokenizer
        self.instruction, self.request = instruction, request
        vision = network.config.vision_config
        patch, merge = vision.patch_size, vision.spatial_merge_size
        pixels = TOKENS * (patch * merge) ** 2
        self.reading = Patches(patch, merge, (pixels, pixels))

    def score(self, image, prompt):
        """The score of an image (3, H, W) in [0, 1]."""
        wide = self.head[0].weight.dtype
        inputs = self.reading(image[None].to(wide))
        patches = inputs["pixel_values"]
        ids = self.tokens(prompt, len(patches) // self.reading.merge**2).to(image.device)
        # The authors' code numbered all tokens in order, not the image's by place.
        positions = torch.arange(len(ids), device=image.device).expand(3, 1, -1)
        states = self.network(
            input_ids=ids[None],
            pixel_values=patches.to(self.network.dtype),
            image_grid_thw=inputs["image_grid_thw"],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[0]
        (place,) = (ids == self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)).nonzero()[:, 0]
        return self.head(states[place].to(wide))[0]

    def tokens(self, prompt, image_tokens):
        """Tokens (L,) of the text about an image of so many tokens.

        Raises:
            ValueError: if the prompt contains a special token.
        """
        check_special_tokens("hpsv3", prompt, (REWARD_TOKEN, IMAGE_TOKEN))
        text = self.instruction.format(text_prompt=prompt) + self.request
        text = QWEN2_VL_CHAT.format(vision=IMAGE_TOKEN * image_tokens, text=text)
        return torch.tensor(self.tokenizer(text).input_ids)


def read_instruction(path):
    """The texts that the network was trained with, from the authors' file, which is not run.

    Raises:
        ValueError: if neither the folder nor the package hpsv3 has it, or it lacks a text.
    """
    package = importlib.util.find_spec("hpsv3")
    if has_file(path, TEXT_FILE):
        file = os.path.join(path, TEXT_FILE)
    elif package is not None:
        file = existing_file(os.path.join(package.submodule_search_locations[0], "dataset"), TEXT_FILE)
    else:
        raise ValueError(
            f"its text {TEXT_FILE} is not on the Hub: pip install --no-deps hpsv3, or put the file of github.com/MizzenAI/HPSv3"
            " into the folder of --reward_path hpsv3=DIR"
        )
    instruction, request = read_texts(file, TEXTS)
    if [instruction.count("{text_prompt}"), request.count(REWARD_TOKEN)] != [1, 1]:
        raise ValueError(f"{file!r} has no texts with {{text_prompt}} and {REWARD_TOKEN}")
    return instruction, request


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with `HPSv3.safetensors`, and read the original's text.

    The folder may also hold `TEXT_FILE`, and `base/`, the configuration and the tokenizer of Qwen2-VL-7B-Instruct.
    """
    texts = read_instruction(path)
    file = hub_file(MODEL_ID, CHECKPOINT, revision) if path is None else existing_file(path, CHECKPOINT)
    base = base_of(path, BASE_ID)
    with one_line_errors(base):
        tokenizer = Qwen2Tokenizer.from_pretrained(base)
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    state = rename_keys(load_state_dict(file), QWEN2_VL_NAMES)
    head = make_head(config.text_config.hidden_size)
    parts = {key.removeprefix("rm_head."): state.pop(key) for key in list(state) if key.startswith("rm_head.")}
    load_into(head, parts, file)
    network = load_pretrained(Qwen2VLForConditionalGeneration, file, config=config, state_dict=state, dtype=dtype)
    return HPSv3(network.model, head.to(torch.promote_types(dtype, torch.float32)), tokenizer, *texts).to(device)
