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
"""ImageReward (huggingface.co/papers/2304.05977): human preference.

SD 1.x scores .1 to .3, fine-tuned models .7 to .8.
"""

import os

import torch
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from .base import ScoreHead, check_batch
from .clip import preprocess_clip
from .loading import (
    existing_file,
    has_file,
    hub_file,
    load_into,
    load_pretrained,
    load_state_dict,
    one_line_errors,
    read_json,
    rename_keys,
)


MODEL_ID = "THUDM/ImageReward"
TOKENIZER_ID = "google-bert/bert-base-uncased"
# Mean and standard deviation of the raw score over the authors' training images.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
VIT_L_16 = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "image_size": 224,
}
# Key names of BLIP's own vision tower -> transformers', applied in this order.
RENAMES = (
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"attn\.qkv", "self_attn.qkv"),
    (r"attn\.proj", "self_attn.projection"),
)


class ImageReward(torch.nn.Module):
    """R = (MLP(h[CLS]) - m) / s, where h are BERT's states of the prompt.

    BERT attends to the vision tower's states of the image. The constants m and s are `MEAN` and `STD`.
    """

    differentiable = True

    def __init__(self, vision, text, head, tokenizer):
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head
        self.tokenizer = tokenizer

    def forward(self, images, prompts):
        check_batch(images, prompts)
        wide = torch.promote_types(self.vision.dtype, torch.float32)
        pixels = preprocess_clip(images.to(wide), self.vision.config.image_size)
        image_states = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).to(images.device)
        states = self.text(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=image_states
        ).last_hidden_state
        return (self.head(states[:, 0].to(wide)) - MEAN) / STD


def make_vision_config(vit):
    """The configuration of a vision tower with the entries of `VIT_L_16`."""
    sizes = {name: vit[name] for name in VIT_L_16}
    return BlipVisionConfig(**sizes, intermediate_size=4 * vit["hidden_size"], layer_norm_eps=1e-6)


def make_text_config(bert, image_width):
    """The configuration of a text tower, from med_config.json, whose cross-attention reads states of `image_width`.

    Raises:
        ValueError: if it has fewer than `MAX_TOKENS` positions.
    """
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = BlipTextConfig(
        **{name: bert[name] for name in (*names, "max_position_embeddings", "hidden_act", "layer_norm_eps")},
        # The file has the width of a ViT-B. The authors' code uses the width of the vision tower instead.
        encoder_hidden_size=image_width,
        # Creates the cross-attention layers. Attention is still not causal: BlipTextModel.forward has its own
        # `is_decoder`, which is false by default.
        is_decoder=True,
        bos_token_id=None,
    )
    if config.max_position_embeddings < MAX_TOKENS:
        raise ValueError(f"max_position_embeddings is below {MAX_TOKENS}, the length of a prompt")
    return config


def load_tokenizer(source, vocab_size):
    """Load the BERT tokenizer of a folder or Hub repository.

    Args:
        vocab_size: of the text tower. The authors' has two tokens more than BERT's vocabulary.

    Raises:
        ValueError: if it cannot be loaded, or is not of that size. The message names the source.
    """
    with one_line_errors(source):
        tokenizer = BertTokenizer.from_pretrained(source)
        ids = sorted(tokenizer.get_vocab().values())
        if ids not in (list(range(vocab_size)), list(range(vocab_size - 2))):
            raise ValueError(f"its vocabulary of {len(ids)} tokens does not fit a text tower of {vocab_size}")
    return tokenizer


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with `ImageReward.pt` and `med_config.json`.

    The folder may also hold the tokenizer's `vocab.txt`, for offline use, and `vit_config.json`, for a vision tower of
    another size.
    """
    if path is None:
        file, config_file = (hub_file(MODEL_ID, name, revision) for name in ("ImageReward.pt", "med_config.json"))
    else:
        file, config_file = (existing_file(path, name) for name in ("ImageReward.pt", "med_config.json"))
    vision_config = make_vision_config(VIT_L_16)
    if has_file(path, "vit_config.json"):
        vit_file = os.path.join(path, "vit_config.json")
        vit = read_json(vit_file)
        with one_line_errors(vit_file):
            vision_config = make_vision_config(vit)
    bert = read_json(config_file)
    with one_line_errors(config_file):
        text_config = make_text_config(bert, vision_config.hidden_size)
    tokenizer = load_tokenizer(path if has_file(path, "vocab.txt") else TOKENIZER_ID, text_config.vocab_size)

    parts = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for key, value in load_state_dict(file).items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][key.removeprefix(prefix)] = value
        elif not key.startswith(("blip.vision_proj.", "blip.text_proj.")):  # used by BLIP's contrastive loss only
            raise ValueError(f"{file!r} does not fit: unexpected {[key]}")
    vision_state, text_state, head_state = parts.values()
    vision_state = rename_keys(vision_state, RENAMES)
    head = ScoreHead(text_config.hidden_size)
    load_into(head, head_state, file)
    vision = load_pretrained(BlipVisionModel, file, config=vision_config, state_dict=vision_state, dtype=dtype)
    text = load_pretrained(
        BlipTextModel, file, config=text_config, state_dict=text_state, dtype=dtype, add_pooling_layer=False
    )
    return ImageReward(vision, text, head.to(torch.promote_types(dtype, torch.float32)), tokenizer).to(device)
