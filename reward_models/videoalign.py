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
"""VideoAlign's VideoReward: human preference of a video and its prompt, on Qwen2-VL-2B (huggingface.co/papers/2501.13918).

Three scores, each with mean 0 and variance 1 over the authors' videos: visual quality, motion quality, text alignment.
The original resizes frames of 8 bits and rounds the result. Here neither is rounded, so that the scores have a gradient.
"""

import functools
import math
import os
import re

import torch
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from .clip import normalize, resize
from .loading import (
    check_keys,
    existing_file,
    load_pretrained,
    load_state_dict,
    one_line_errors,
    read_json,
    read_texts,
    rename_keys,
)
from .vision_language import (
    QWEN2_VL_CHAT,
    QWEN2_VL_NAMES,
    OneByOne,
    base_of,
    check_special_tokens,
    choose_size,
    make_patches,
)


DIMENSIONS = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment: the order of the head's outputs
REWARD_TOKENS = tuple(f"<|{name}_reward|>" for name in DIMENSIONS)
VIDEO_TOKEN = "<|video_pad|>"
TEMPLATE_FILE, TEMPLATE = "prompt_template.py", "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
MIN_FRAMES, MAX_FRAMES, MIN_TOKENS = 4, 768, 128  # of the original's preprocessing; MIN_TOKENS is for each frame
# The supported settings of model_config.json. Others select other code of the original.
SETTINGS = {
    "data_config": {"num_frames": None, "sample_type": "uniform", "prompt_template_type": "detailed_special"},
    "model_config": {"output_dim": 3, "use_special_tokens": True},
}
# Key names of the original's peft model, applied before `QWEN2_VL_NAMES`.
NAMES = ((r"^base_model\.model\.", ""), (r"\.(base_layer|default|modules_to_save)(?=\.)", ""), *QWEN2_VL_NAMES)
EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "rm_head.weight"


def choose_frames(num_frames, fps, wanted_fps):
    """Indices of the frames that the network sees: an even number, evenly spaced, `wanted_fps` frames per second.

    They are at least `MIN_FRAMES`, if there are as many.

    Raises:
        ValueError: if there are fewer than two frames.
    """
    if num_frames < 2:
        raise ValueError("videoalign reads pairs of frames, and these videos have one: give it two or more")
    most = min(MAX_FRAMES, num_frames) // 2 * 2
    number = min(max(num_frames / fps * wanted_fps, MIN_FRAMES), most)
    return torch.linspace(0, num_frames - 1, 2 * round(number / 2)).round().long()


class VideoAlign(OneByOne):
    """R = sum_d (w_d . h_d - m_d) / s_d, where h_d is the network's state at the special token of the dimension d.

    Args:
        network: Qwen2VLModel.
        head: the weights w (3, width).
        tokenizer: has `REWARD_TOKENS`.
        template: text with a place for the prompt and with `REWARD_TOKENS`.
        config: content of the original's model_config.json.
        dimensions: those of `DIMENSIONS` that are summed.

    Attributes:
        fps: number of frames per second of the videos.
    """

    takes_videos = True
    kind = "videos"

    def __init__(self, network, head, tokenizer, template, config, dimensions):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.template = template
        self.dimensions = [DIMENSIONS.index(name) for name in dimensions]
        self.wanted_fps = config["data_config"]["fps"]
        self.max_pixels = config["data_config"]["max_frame_pixels"]
        self.fps = None
        self.register_buffer("head", head)
        for kind in ("mean", "std"):
            values = [config["inference_config"][f"{name}_{kind}"] for name in DIMENSIONS]
            self.register_buffer(kind, torch.tensor(values, dtype=head.dtype))

    def forward(self, videos, prompts):
        return super().forward(videos, prompts)[:, self.dimensions].sum(1)

    def score(self, video, prompt):
        """The scores (3,) of a video (F, 3, H, W) in [0, 1] in all `DIMENSIONS`."""
        vision, wide = self.network.config.vision_config, self.head.dtype
        frames = video[choose_frames(len(video), self.fps, self.wanted_fps).to(video.device)].to(wide)
        factor = vision.patch_size * vision.spatial_merge_size
        size = choose_size(*video.shape[-2:], factor, MIN_TOKENS * factor**2, self.max_pixels)
        patches, grid = make_patches(normalize(resize(frames, size)), vision.patch_size, vision.spatial_merge_size)
        ids = self.tokens(prompt, len(patches) // vision.spatial_merge_size**2).to(video.device)
        # The authors' version of transformers numbered all tokens in order, not the video's by place and time.
        positions = torch.arange(len(ids), device=video.device).expand(3, 1, -1)
        states = self.network(
            input_ids=ids[None],
            pixel_values_videos=patches.to(self.network.dtype),
            video_grid_thw=torch.tensor([grid], device=video.device),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[0]
        reward_ids = self.tokenizer.convert_tokens_to_ids(list(REWARD_TOKENS))
        places = torch.cat([(ids == token).nonzero()[:, 0] for token in reward_ids])
        return ((states[places].to(wide) * self.head).sum(1) - self.mean) / self.std

    def tokens(self, prompt, video_tokens):
        """Tokens (L,) of the text for a video of `video_tokens` tokens.

        Raises:
            ValueError: if the prompt contains a special token.
        """
        check_special_tokens("videoalign", prompt, (*REWARD_TOKENS, VIDEO_TOKEN))
        text = QWEN2_VL_CHAT.format(vision=VIDEO_TOKEN * video_tokens, text=self.template.format(text_prompt=prompt))
        return torch.tensor(self.tokenizer(text).input_ids)


def read_template(path):
    """Read the text that the network was trained with from the original's prompt_template.py, without running it.

    Raises:
        ValueError: if the file is missing, or has no such text with each of `REWARD_TOKENS` once.
    """
    file = existing_file(path, TEMPLATE_FILE)
    (text,) = read_texts(file, [TEMPLATE])
    if [text.count(token) for token in (*REWARD_TOKENS, "{text_prompt}")] != [1, 1, 1, 1]:
        raise ValueError(f"{file!r} has no text {TEMPLATE} with {', '.join(REWARD_TOKENS)} and {{text_prompt}}")
    return text


def read_config(path):
    """Read the original's model_config.json.

    Raises:
        ValueError: if it is missing, or is the one of another kind of reward model.
    """
    file = existing_file(path, "model_config.json")
    config = read_json(file)
    with one_line_errors(file):
        for section, settings in SETTINGS.items():
            for name, value in settings.items():
                if config[section][name] != value:
                    raise ValueError(f"{name} is {config[section][name]!r}, and only {value!r} is supported")
    return config


def read_checkpoint(path):
    """Read the latest checkpoint-N of a folder, with the key names of transformers 5.

    Returns:
        (state dict of all weights, or of those that were trained; its file).
    """
    folders = [name for name in os.listdir(path) if re.fullmatch(r"checkpoint-\d+", name)]
    if not folders:
        raise ValueError(f"{path!r} holds no checkpoint-N")
    folder = os.path.join(path, max(folders, key=lambda name: int(name.split("-")[1])))
    file = existing_file(folder, "model.pth", "adapter_model.safetensors")
    state = load_state_dict(file)
    if file.endswith(".safetensors"):
        state |= load_state_dict(existing_file(folder, "non_lora_state_dict.pth"))
    return rename_keys({key: value for key, value in state.items() if "original_module" not in key}, NAMES), file


def merge_lora(state, weights, lora):
    """Add the products of LoRA matrices to the weights that they change.

    Args:
        state: state dict, with or without these weights.
        weights: all weights of the network, in the precision of the result.
        lora: the section peft_lora_config of model_config.json.
    """
    scale = lora["lora_alpha"] / (math.sqrt(lora["lora_r"]) if lora["use_rslora"] else lora["lora_r"])
    merged = {key: value for key, value in state.items() if ".lora_" not in key}
    for key in state.keys() - merged.keys():
        if key.endswith(".lora_A.weight"):
            name = key.replace(".lora_A.", ".")
            down, up = state[key].double(), state[key.replace(".lora_A.", ".lora_B.")].double()
            weight = merged.get(name, weights[name]).double() + scale * up @ down
            merged[name] = weight.to(weights[name].dtype)
    return merged


def load_network(path, base, tokenizer, lora, dtype):
    """Load the base model, and the weights that the checkpoint replaces.

    Returns:
        Qwen2VLModel, head (3, width).

    Raises:
        ValueError: if the checkpoint does not fit the base model.
    """
    state, file = read_checkpoint(path)
    model = load_pretrained(Qwen2VLForConditionalGeneration, base, dtype=dtype)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # what is added comes from the checkpoint
    weights = {**model.state_dict(), HEAD: torch.empty(len(DIMENSIONS), model.config.text_config.hidden_size)}
    with one_line_errors(file):
        state = merge_lora(state, weights, lora)
    # A file without LoRA matrices beside it has all weights, of which lm_head is not used.
    missing = weights.keys() - {"lm_head.weight"} if file.endswith(".pth") else {EMBEDDINGS, HEAD}
    shapes = [(key, state[key].shape, weights[key].shape) for key in state.keys() & weights.keys()]
    wrong_shape = [(key, found, wanted) for key, found, wanted in shapes if found != wanted]
    check_keys(file, missing - state.keys(), state.keys() - weights.keys(), wrong_shape)
    head = state.pop(HEAD)
    model.load_state_dict(state, strict=False)
    return model.model, head


def load(path, revision, device, dtype, dimensions=DIMENSIONS):
    """Load from a folder with the files of the Hub repository KwaiVGI/VideoReward and `TEMPLATE_FILE`.

    The first are model_config.json and `checkpoint-N/`, which holds `model.pth`, or `adapter_model.safetensors` and
    `non_lora_state_dict.pth`. The other is in the repository KwaiVGI/VideoAlign on GitHub; it is read, not run. The
    folder may also hold `base/`, the transformers model that was fine-tuned, with its tokenizer, for offline use.
    """
    if path is None:
        raise ValueError(
            f"its text {TEMPLATE_FILE} is not on the Hub: download KwaiVGI/VideoReward, add this file of"
            " github.com/KwaiVGI/VideoAlign, and give the folder as --reward_path NAME=DIR"
        )
    config, template = read_config(path), read_template(path)
    base = base_of(path, config["model_config"]["model_name_or_path"])
    with one_line_errors(base):
        tokenizer = Qwen2Tokenizer.from_pretrained(base)
        tokenizer.add_tokens(list(REWARD_TOKENS), special_tokens=True)
    network, head = load_network(path, base, tokenizer, config["peft_lora_config"], dtype)
    head = head.to(torch.promote_types(dtype, torch.float32))
    with one_line_errors(os.path.join(path, "model_config.json")):
        return VideoAlign(network, head, tokenizer, template, config, dimensions).to(device)


load_vq, load_mq, load_ta = (functools.partial(load, dimensions=(name,)) for name in DIMENSIONS)
