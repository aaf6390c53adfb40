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
"""What the text-to-video families share: sizes with frames, latents (B, C, f, h, w), videos (B, F, 3, H, W)."""


class VideoModel:
    """What a family of videos has instead of what images have; a mixin, before `FlowModel` or another family.

    A size is (height, width, frames), and latents are (B, C, f, h, w), also where the network takes another layout.

    Attributes:
        default_size: (height, width, frames) by default, the pipeline's own.
        fps: frames per second of the videos that the model was trained on.
        patch: side of the patches that the network takes, in latents.
    """

    default_size = (480, 832, 81)
    fps = 16
    patch = 2

    @property
    def spatial_factor(self):
        """How many pixels high and wide a latent is."""
        return self.pipeline.vae_scale_factor_spatial

    @property
    def temporal_factor(self):
        """How many frames a latent is long, but the first, which is one."""
        return self.pipeline.vae_scale_factor_temporal

    @property
    def size_multiple(self):
        """What height and width must be multiples of, in pixels."""
        return self.patch * self.spatial_factor

    def latents_shape(self, batch_size, size):
        height, width, frames = size
        factor = self.spatial_factor
        length = (frames - 1) // self.temporal_factor + 1
        return batch_size, self.latent_channels(self.pipeline), length, height // factor, width // factor

    def image_seq_len(self, size):
        """How many patches a video has."""
        _, _, length, height, width = self.latents_shape(1, size)
        return length * height * width // self.patch**2

    def check_size(self, size):
        """Raise ValueError for a size that the model cannot draw, of which some pipelines would draw another."""
        height, width, frames = size
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(f"videos of {height} x {width} pixels: not multiples of {self.size_multiple}")
        if frames < 1 or (frames - 1) % self.temporal_factor:
            raise ValueError(f"videos of {frames} frames: not one and a multiple of {self.temporal_factor}")

    def chunk_frames(self, num_frames):
        """How many frames each latent frame decodes to, or `None` for a decoder that is not causal."""
        return None

    def pipeline_arguments(self, size, *given, **options):
        return {**super().pipeline_arguments(size[:2], *given, **options), "num_frames": size[2]}


def to_videos(decoded):
    """What a VAE gives, (B, 3, F, H, W) in [-1, 1] and beyond -> videos (B, F, 3, H, W) in [0, 1], in float32.

    The gradient passes the clamp unchanged: some VAEs of videos saturate many of their pixels.
    """
    videos = (decoded.float() / 2 + 0.5).transpose(1, 2)
    return videos.detach().clamp(0, 1) + (videos - videos.detach())
