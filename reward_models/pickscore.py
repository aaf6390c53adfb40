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
"""PickScore (huggingface.co/papers/2305.01569): predicts which of two images people prefer. SD 1.x scores 18 to 24."""

import os

import torch

from .clip import ClipAgreement, load_clip, load_tokenizer, tokenizer_source
from .loading import existing_file


MODEL_ID = "yuvalkirstain/PickScore_v1"


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with a transformers CLIPModel.

    The tokenizer's files are optional in the folder. R = exp(logit_scale) cos(f(image), g(prompt)), where the scale is
    float32 or wider.
    """
    source = MODEL_ID if path is None else os.path.dirname(existing_file(path, "config.json"))
    tokenizer = load_tokenizer(tokenizer_source(path))
    clip = load_clip(source, dtype, revision)
    scale = clip.logit_scale.detach().to(torch.promote_types(dtype, torch.float32)).exp().item()
    return ClipAgreement(clip, tokenizer, scale=scale).to(device)
