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
"""The CLIP of tiny-emoji and its aesthetic head, which scores glossy 3D emoji high and flat cartoons low."""

import torch
import torch.nn.functional as F
from reward_models.base import ScoreHead
from reward_models.clip import preprocess_clip
from tiny_stable_diffusion import TOKEN_LENGTH, tokenize
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from .data import BACKGROUNDS, RESOLUTION, STYLE_WORDS, Captions, degrade
from .tokenizer import make_tokenizer
from .training import fit


SCORES = torch.tensor([3.0, 8.0])  # of a cartoon and of a 3D emoji
WORST = 1.0  # the score of an image that is all blur or noise


def make_clip(concepts):
    """An untrained CLIP for 48 x 48 pixels with a projection of 768, and the tokenizer that knows all captions."""
    words = ["a", "an", "on", "background", *BACKGROUNDS, *(word for word in STYLE_WORDS if word != "3d"), *concepts]
    tokenizer = make_tokenizer(words)
    shared = {"intermediate_size": 512, "hidden_size": 128, "num_attention_heads": 4, "projection_dim": 768}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=TOKEN_LENGTH,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shared,
    )
    vision = CLIPVisionConfig(image_size=RESOLUTION, patch_size=6, num_hidden_layers=4, **shared)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=768)
    return CLIPModel(config), tokenizer


def contrast(logits, true):
    """Cross-entropy of each row of `logits` against an equal share for each of its `true` entries."""
    return -(true / true.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


def train_clip(emoji, state_file, steps, concepts_in_batch=24, images_of_each=4):
    """Train both towers contrastively, and the head by the squared error of its score. Returns (clip, tokenizer, head).

    Several images of a concept share a batch, so that style and background must be told apart as well.
    """
    torch.manual_seed(3)
    clip, tokenizer = make_clip(emoji.concepts)
    model = torch.nn.ModuleDict({"clip": clip, "head": ScoreHead(768)})
    captions = Captions(emoji.concepts)
    text = tokenize(tokenizer, captions.texts)

    def loss(generator):
        drawn = torch.randperm(len(emoji.concepts), generator=generator)[:concepts_in_batch]
        batch = emoji.batch(len(drawn) * images_of_each, generator, drawn.repeat_interleave(images_of_each))
        index = captions.index(batch, generator)
        true = captions.describe(index, batch).float()
        seen, amount = degrade(batch.images, generator)
        output = model["clip"](input_ids=text[index], pixel_values=preprocess_clip(seen, RESOLUTION))
        matching = (contrast(output.logits_per_image, true) + contrast(output.logits_per_text, true.T)) / 2
        quality = SCORES[batch.styles] + amount * (WORST - SCORES[batch.styles])
        error = F.mse_loss(model["head"](output.image_embeds), quality)
        return matching + 0.1 * error, {"contrast": matching, "rmse": error.detach().sqrt()}

    # No moving average: the head is a product of matrices, and the product of their averages is smaller.
    model = fit(model, loss, steps, 1e-3, seed=3, state_file=state_file, weight_decay=1e-2, ema_decay=0.0)
    return model["clip"].eval(), tokenizer, model["head"].eval()
