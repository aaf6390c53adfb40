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
"""Write the parts of tiny-wan to assets/: float16 files of models that work in float32."""

import os

from emoji_models.saving import save_half

from diffusers import WanPipeline


def save_vae(vae, out):
    save_half(vae, os.path.join(out, "tiny-wan", "vae"))


def save_pipeline(parts, out):
    """The pipeline's folder."""
    folder = os.path.join(out, "tiny-wan")
    WanPipeline(**parts).save_pretrained(folder)
    for name in ("vae", "text_encoder", "transformer"):
        save_half(parts[name], os.path.join(folder, name))
