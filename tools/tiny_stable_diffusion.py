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
"""What the embedded Stable Diffusions, of digits and of emoji, have in common."""

from diffusers import DDIMScheduler


TOKEN_LENGTH = 16


def tokenize(tokenizer, captions):
    """Captions -> token ids (B, TOKEN_LENGTH)."""
    return tokenizer(
        captions, padding="max_length", max_length=TOKEN_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def make_scheduler():
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
