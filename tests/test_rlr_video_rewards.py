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

import numpy as np
import pytest
import torch
from reward_models import PerFrame, WeightedSum, load_reward, load_rewards, parse_reward
from reward_models.motion import SMOOTH, motion
from rlr_testing import TINY_AESTHETIC, TINY_CLIP
from transformers import CLIPModel


PATHS = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP, "video_smoothness": TINY_CLIP}
PROMPTS = ["a red seven", "a blue two"]
CUSTOM = """
import torch

SEEN = []

def still(videos, prompts):
    SEEN.append(tuple(videos.shape))
    return -videos.diff(dim=1).square().mean((1, 2, 3, 4))
still.takes_videos = True

def bright(images, prompts):
    SEEN.append(tuple(images.shape))
    return images.mean((1, 2, 3))

def counts(videos, prompts):
    return (255 * videos).round().int().sum((1, 2, 3, 4))
counts.takes_videos = True

def pixels(videos, prompts):
    return videos.mean((1, 2, 3, 4))
pixels.takes_videos = pixels.mean_over_frames = True

class Speed:
    takes_videos, fps = True, None

    def __call__(self, videos, prompts):
        return self.fps * videos.mean((1, 2, 3, 4))

def vague(videos, prompts):
    return pixels(videos, prompts)
vague.takes_videos = "yes"

def single(images, prompts):
    return images.mean()
"""


@pytest.fixture(scope="module")
def custom_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("custom") / "mine.py"
    file.write_text(CUSTOM)
    return str(file)


@pytest.fixture(scope="module")
def aesthetic():
    return load_reward("aesthetic", path=TINY_AESTHETIC, dtype=torch.float64)


@pytest.fixture(scope="module")
def videos():
    """Two videos of five frames."""
    return torch.rand(2, 5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Exp(torch.autograd.Function):
    """exp, which writes down when it is computed and differentiated."""

    @staticmethod
    def forward(ctx, x, events):
        events.append("forward")
        ctx.save_for_backward(x.exp())
        ctx.events = events
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        (result,) = ctx.saved_tensors
        ctx.events.append("backward")
        return result * gradient, None


@pytest.mark.parametrize("reduction", ["mean", "min"])
def test_frames_are_scored_one_by_one_with_the_gradient_of_autograd(reduction, aesthetic, videos):
    videos = videos.clone().requires_grad_()
    frames = torch.stack([aesthetic(frame, PROMPTS) for frame in videos.unbind(1)], dim=1)
    expected = frames.mean(1) if reduction == "mean" else frames.min(1).values
    (gradient,) = torch.autograd.grad(expected.sum(), videos)
    scores = PerFrame("aesthetic", aesthetic, reduction)(videos, PROMPTS)
    assert torch.equal(scores, expected)
    torch.testing.assert_close(torch.autograd.grad(scores.sum(), videos)[0], gradient, rtol=1e-12, atol=1e-15)
    of_min = (gradient.abs().amax((2, 3, 4)) > 0).sum(1)
    assert of_min.tolist() == ([5, 5] if reduction == "mean" else [1, 1])


def test_only_one_frame_has_a_graph_at_a_time(videos):
    events, videos = [], videos.clone().requires_grad_()
    reward = lambda images, prompts: Exp.apply(images, events).mean((1, 2, 3))  # noqa: E731
    reward.differentiable = True
    scores = PerFrame("exp", reward, "mean")(videos, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), videos)
    torch.testing.assert_close(gradient, videos.exp() / videos[0].numel())
    # A graph lives from the second forward pass of its frame to its backward pass.
    assert events == ["forward"] * 5 + ["forward", "backward"] * 5


def test_a_sum_scores_videos_as_its_members_do(videos, custom_file):
    terms = parse_reward(f"aesthetic:2,jpeg_compressibility,{custom_file}:still:3,motion,video_smoothness")
    rewards = load_rewards(terms, PATHS, dtype=torch.float64, size=(32, 32, 5))
    assert rewards.has_gradient and not rewards.differentiable
    whole = rewards(videos, PROMPTS, with_gradient=True)
    parts = WeightedSum(rewards.members, batch_size=1)(videos, PROMPTS, with_gradient=True)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-12)
    sizes = [load_reward("jpeg_compressibility")(frame, PROMPTS) for frame in videos.unbind(1)]
    torch.testing.assert_close(whole.members["jpeg_compressibility"], torch.stack(sizes).mean(0))
    torch.testing.assert_close(whole.black_box, whole.members["jpeg_compressibility"])
    torch.testing.assert_close(
        whole.members[f"{custom_file}:still"], -videos.diff(dim=1).square().mean((1, 2, 3, 4)).float()
    )
    videos = videos.clone().requires_grad_()
    total = sum(w * reward(videos, PROMPTS) for w, reward in rewards.members.values() if reward.differentiable)
    assert whole.gradient.shape == videos.shape
    torch.testing.assert_close(whole.gradient, torch.autograd.grad(total.sum(), videos)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunks", [[1, 4], [1, 2, 2], [5]])
def test_a_random_chunk_of_frames_estimates_means_over_frames_without_bias(chunks, aesthetic, videos):
    """The expectation of scores and gradient over a chunk drawn in proportion to its frames, by enumeration."""
    rewards = WeightedSum(
        {"aesthetic": (2.0, PerFrame("aesthetic", aesthetic, "mean")), "pixels": (-1.0, pixel_mean())}
    )
    assert rewards.mean_over_frames
    whole = rewards(videos, PROMPTS, with_gradient=True)
    total, gradient = torch.zeros(2), torch.zeros_like(videos)
    for end, n in zip(np.cumsum(chunks), chunks):
        part = rewards(videos[:, end - n : end], PROMPTS, with_gradient=True)
        total += n / 5 * part.total
        gradient[:, end - n : end] += n / 5 * part.gradient
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, whole.gradient, rtol=1e-10, atol=1e-14)


def pixel_mean():
    reward = lambda videos, prompts: videos.mean((1, 2, 3, 4))  # noqa: E731
    reward.differentiable = reward.mean_over_frames = True
    return reward


@pytest.mark.parametrize(
    ("text", "reduction", "expected"),
    [
        ("aesthetic,clip_score:-1,jpeg_compressibility", "mean", True),
        ("aesthetic", "min", False),
        ("aesthetic,motion", "mean", False),
        ("video_smoothness", "mean", False),
        ("mine.py:bright", "mean", True),
        ("mine.py:still", "mean", False),
        ("mine.py:pixels,aesthetic", "mean", True),
        ("mine.py:pixels,aesthetic", "min", False),
    ],
)
def test_a_sum_knows_whether_it_is_a_mean_over_frames(text, reduction, expected, custom_file):
    terms = parse_reward(text.replace("mine.py", custom_file))
    rewards = load_rewards(terms, PATHS, size=(32, 32, 2), frame_reduction=reduction)
    assert rewards.mean_over_frames is expected


def test_video_smoothness_is_the_mean_cosine_of_consecutive_embeddings(videos):
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float64).eval()
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    videos = videos.clone().requires_grad_()
    embeds = clip.get_image_features(((videos - mean) / std).flatten(0, 1)).pooler_output.unflatten(0, (2, 5))
    expected = torch.stack(
        [sum(e[i] @ e[i + 1] / (e[i].norm() * e[i + 1].norm()) for i in range(4)) / 4 for e in embeds]
    )
    reward = load_reward("video_smoothness", path=TINY_CLIP, dtype=torch.float64)
    scores = reward(videos, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    first, second = (torch.autograd.grad(x.sum(), videos)[0] for x in (scores, expected))
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-14)
    assert first.abs().amax((2, 3, 4)).min() > 0
    still = videos[:, :1].detach().expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(reward(still, PROMPTS), torch.ones(2).double())


def waves(phases, amplitude=0.25, period=32, size=64):
    """A video (1, F, 3, H, W) of waves whose crests move to the right."""
    x = torch.arange(size, dtype=torch.float64)
    rows = [0.5 + amplitude * torch.cos(2 * torch.pi * (x - phase) / period) for phase in phases]
    return torch.stack(rows).view(1, len(phases), 1, 1, size).expand(-1, -1, 3, size, -1)


def test_motion_of_waves_has_a_closed_form():
    """Waves of amplitude a, averaged over blocks, have the variance v, and the covariance v cos(phase)."""
    x = torch.arange(8, dtype=torch.float64)
    gain = torch.exp(2j * torch.pi * x / 32).mean().abs()  # of an average over 8 pixels
    for shift in (0, 1, 4, 16):
        video = waves([0, shift, 2 * shift]).clone().requires_grad_()
        variance = (0.25 * gain) ** 2 / 2
        cosine = torch.cos(torch.tensor(2 * torch.pi * shift / 32, dtype=torch.float64))
        expected = 1 - (variance * cosine + SMOOTH) / (variance + SMOOTH)
        score = motion(video, [""])
        torch.testing.assert_close(score, expected[None], rtol=1e-9, atol=1e-12)
        gradient = torch.autograd.grad(score.sum(), video)[0]
        assert torch.isfinite(gradient).all() and bool(gradient.abs().max() > 1e-9) == (shift > 0)


def test_motion_is_not_gained_by_noise_flicker_or_fading():
    still, generator = waves([0] * 6), torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(still.shape, dtype=torch.float64, generator=generator)
    bright = torch.tensor([1.0, 0.8] * 3).view(1, 6, 1, 1, 1)
    moving = motion(waves(range(0, 12, 2)), [""])
    for cheat in (still + noise, still * bright, still - 0.2 + 0.2 * bright, torch.full_like(still, 0.5)):
        assert motion(cheat.clamp(0, 1), [""]) < moving / 4
    assert motion(torch.zeros(1, 2, 3, 32, 32), [""]).abs() < 1e-6
    assert motion(torch.rand(1, 2, 3, 20, 13), [""]) > 0  # no whole number of blocks


@pytest.mark.parametrize("name", ["motion", "video_smoothness"])
def test_videos_of_one_frame_are_refused_where_frames_are_compared(name):
    reward = load_reward(name, path=PATHS.get(name))
    with pytest.raises(ValueError, match=f"{name} compares consecutive frames, and these videos have one"):
        reward(torch.rand(1, 1, 3, 32, 32), [""])


def test_invalid_videos_are_refused(aesthetic, videos):
    for reward in (PerFrame("aesthetic", aesthetic, "mean"), motion):
        for bad, problem in (
            (videos[0], r"videos of shape \(5, 3, 32, 32\) are not \(B, F, 3, H, W\)"),
            (videos.transpose(1, 2), r"\(2, 3, 5, 32, 32\) are not \(B, F, 3, H, W\)"),
            (2 * videos, r"videos must lie in \[0, 1\]"),
            (videos[:1], "1 videos with 2 prompts: give one prompt per video"),
        ):
            with pytest.raises(ValueError, match=problem):
                reward(bad, PROMPTS)


def test_video_rewards_and_unknown_reductions_are_refused_by_name(custom_file):
    for name in ("motion", f"{custom_file}:still"):
        with pytest.raises(ValueError, match=f"reward '{name}' scores whole videos, not images: give it videos"):
            load_rewards(parse_reward(name), {}, size=(32, 32))
    with pytest.raises(ValueError, match="unknown reduction of frames 'max', known are: mean, min"):
        load_rewards(parse_reward("jpeg_compressibility"), {}, size=(32, 32, 5), frame_reduction="max")


def test_custom_rewards_are_tried_on_what_they_take(custom_file):
    rewards = load_rewards(
        parse_reward(f"{custom_file}:still,{custom_file}:bright,{custom_file}:counts"), {}, size=(24, 40, 3)
    )
    still, bright, counts = (reward for _, reward in rewards.members.values())
    assert set(still.function.__globals__["SEEN"]) == {(2, 3, 3, 24, 40)}
    assert set(bright.reward.function.__globals__["SEEN"]) == {(2, 3, 24, 40)}
    assert still.differentiable and bright.differentiable and not counts.differentiable
    for name, problem in (
        ("vague", "cannot be used: its attribute takes_videos is 'yes', not True or False"),
        ("single", r"is not a reward: it returned a tensor of shape \(\) instead of \(2,\)"),
        ("missing", "has no callable 'missing'"),
    ):
        with pytest.raises(ValueError, match=f"reward '{custom_file}:{name}' .*{problem}"):
            load_rewards(parse_reward(f"{custom_file}:{name}"), {}, size=(24, 40, 3))


NEIGHBOUR = """
import torch

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        import helper
        ctx.save_for_backward(x)
        return helper.two * x

    @staticmethod
    def backward(ctx, gradient):
        assert len(ctx.saved_tensors) == 1  # computes the frame again
        import helper
        return helper.two * gradient

def double(images, prompts):
    return Double.apply(images).mean((1, 2, 3))
"""


def test_the_code_beside_a_custom_reward_is_imported_once_in_all_passes(tmp_path, videos):
    (tmp_path / "mine.py").write_text(NEIGHBOUR)
    (tmp_path / "helper.py").write_text("two = 2\n")
    rewards = load_rewards(parse_reward(f"{tmp_path}/mine.py:double"), {}, size=(32, 32, 5))
    (neighbours,) = (reward.reward.code.neighbours for _, reward in rewards.members.values())
    module = neighbours.modules["helper"]
    result = rewards(videos, PROMPTS, with_gradient=True)
    torch.testing.assert_close(result.gradient, torch.full_like(videos, 2 / videos[0].numel()))
    assert neighbours.modules["helper"] is module


def test_a_bad_score_of_a_frame_names_the_reward():
    reward = lambda images, prompts: images.mean((1, 2, 3)) / (images.amax((1, 2, 3)) > 0)  # noqa: E731
    reward.differentiable = True
    videos = torch.ones(2, 3, 3, 8, 8)
    videos[1, 2] = 0
    with pytest.raises(ValueError, match="reward 'mine' returned nan for prompt 'a blue two'"):
        WeightedSum({"mine": (1.0, PerFrame("mine", reward, "mean"))})(videos, PROMPTS, with_gradient=True)


def test_the_frame_rate_reaches_rewards_that_have_one(custom_file):
    terms, videos = parse_reward(f"{custom_file}:Speed,aesthetic"), torch.full((1, 2, 3, 32, 32), 0.5)
    rewards = load_rewards(terms, PATHS, size=(32, 32, 2), fps=16)
    assert rewards(videos, [""]).members[f"{custom_file}:Speed"].item() == 8
    rewards.set_fps(4)
    assert rewards(videos, [""]).members[f"{custom_file}:Speed"].item() == 2
    for fps in (None, 0):
        with pytest.raises(ValueError, match=f"Speed' needs the frame rate of the videos: .* not {fps}"):
            load_rewards(terms, PATHS, size=(32, 32, 2), fps=fps)
        with pytest.raises(ValueError, match="Speed' needs the frame rate"):
            rewards.set_fps(fps)
