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
"""CLIP score: the cosine similarity of image and prompt under CLIP ViT-L/14. SD 1.5 scores about .275."""

import os

from .clip import CLIP_ID, ClipAgreement, load_clip, load_tokenizer
from .loading import existing_file


def load(path, revision, device, dtype):
    """Load from the Hub, or from a folder with a transformers CLIPModel and its tokenizer."""
    source = CLIP_ID if path is None else os.path.dirname(existing_file(path, "config.json"))
    tokenizer = load_tokenizer(source, revision)
    return ClipAgreement(load_clip(source, dtype, revision), tokenizer).to(device)
