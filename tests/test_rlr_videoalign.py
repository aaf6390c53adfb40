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

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import load_reward, load_rewards, parse_reward
from reward_models.videoalign import choose_frames
from reward_models.vision_language import choose_size, make_patches
from rlr_tiny_rewards import TEMPLATE, VIDEOALIGN, save_videoalign
from transformers import Qwen2VLImageProcessorPil


LAYOUTS = ("trained", "all")  # the weights in the checkpoint
PROMPTS = ["a red seven", "two blue birds {fly}"]
MEAN, STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """{layout: (folder, peft model in float64, tokenizer)} of a tiny VideoReward."""
    result = {}
    for layout in LAYOUTS:
        folder = tmp_path_factory.mktemp(layout)
        model, tokenizer = save_videoalign(folder, full=layout == "all")
        result[layout] = str(folder), model.double(), tokenizer
    return result


@pytest.fixture
def original(originals):
    return originals["trained"]


@pytest.fixture
def folder(original, tmp_path):
    """A copy of the folder, to be damaged."""
    return shutil.copytree(original[0], tmp_path / "videoalign")


def cut_by_hand(frames, patch):
    """Patches of frames (2 T, 3, H, W) in the order of Qwen2-VL, one after the other."""
    height, width = frames.shape[-2:]
    return torch.stack(
        [
            frames[t : t + 2, :, y + dy : y + dy + patch, x + dx : x + dx + patch].transpose(0, 1).flatten()
            for t in range(0, len(frames), 2)
            for y in range(0, height, 2 * patch)
            for x in range(0, width, 2 * patch)
            for dy in (0, patch)
            for dx in (0, patch)
        ]
    )


def reference(original, frames, prompt):
    """Scores (3,) of frames (2 T, 3, H, W) in [0, 1], whose size fits, as the original computes them."""
    _, model, tokenizer = original
    mean, std = (frames.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    grid = torch.tensor([[len(frames) // 2, frames.shape[-2] // 4, frames.shape[-1] // 4]])
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        + "<|video_pad|>" * (math.prod(grid[0].tolist()) // 4)
        + f"<|vision_end|>{TEMPLATE.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text, return_tensors="pt")
    inner = model.base_model.model
    positions = torch.arange(tokens.input_ids.shape[1]).expand(3, 1, -1)
    states = inner.model(
        **tokens,
        pixel_values_videos=cut_by_hand((frames - mean) / std, patch=4),
        video_grid_thw=grid,
        position_ids=positions,
    ).last_hidden_state
    logits = inner.rm_head(states)[0]
    scores = []
    for i, name in enumerate(("VQ", "MQ", "TA")):
        (place,) = (tokens.input_ids[0] == tokenizer.convert_tokens_to_ids(f"<|{name}_reward|>")).nonzero()
        constants = VIDEOALIGN["inference_config"]
        scores.append((logits[place.item(), i] - constants[f"{name}_mean"]) / constants[f"{name}_std"])
    return torch.stack(scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parity_with_the_original(layout, originals):
    """Scores and gradient of a fine-tuned model that peft runs with its LoRA apart, in float64."""
    original = originals[layout]
    videos = torch.rand(2, 9, 3, 88, 96, dtype=torch.float64).requires_grad_()
    frames = [0, 3, 5, 8]  # at 8 frames per second two seconds would be 2, but the least is four
    expected = torch.stack([reference(original, video[frames], p) for video, p in zip(videos, PROMPTS)])
    (gradient,) = torch.autograd.grad(expected.sum(), videos)
    assert (gradient[:, frames].abs().amax((2, 3, 4)) > 0).all()
    for i, suffix in enumerate(("_vq", "_mq", "_ta", "")):
        reward = load_reward(f"videoalign{suffix}", path=original[0], dtype=torch.float64)
        reward.fps = 8
        scores = reward(videos, PROMPTS)
        target = expected[:, i] if suffix else expected.sum(1)
        assert (scores - target).abs().max() <= 1e-6 * target.abs().max()
    (result,) = torch.autograd.grad(scores.sum(), videos)
    assert (result - gradient).abs().max() <= 1e-5 * gradient.abs().max()


def test_frames_are_resized_as_by_the_original(original):
    """Other sizes than the network's: bicubic, in float instead of 8 bits."""
    reward = load_reward("videoalign", path=original[0], dtype=torch.float64)
    reward.fps = 2
    video = torch.nn.functional.interpolate(torch.rand(4, 3, 12, 20).double(), (60, 100), mode="bicubic").clamp(0, 1)
    images = [Image.fromarray((frame * 255).round().byte().permute(1, 2, 0).numpy()) for frame in video]
    height, width = choose_size(60, 100, 8, 128 * 8**2, 448 * 448)
    resized = [np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
    frames = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).double() / 255
    expected = reference(original, frames, PROMPTS[0])
    score = reward(video[None], PROMPTS[:1])
    assert abs(score.item() - expected.sum().item()) < 0.02 * expected.abs().max()


def test_patches_are_those_of_the_image_processor_and_of_a_convolution():
    frames = torch.rand(4, 3, 56, 84)
    patches, grid = make_patches(frames, 14, 2)
    assert grid == (2, 4, 6) and torch.equal(patches, cut_by_hand(frames, patch=14))
    image = Image.fromarray((frames[0] * 255).byte().permute(1, 2, 0).numpy())
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 1, "longest_edge": 10**6})
    target = processor(image, return_tensors="pt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    patches, grid = make_patches(((pixels - mean) / std).expand(2, -1, -1, -1), 14, 2)
    assert target["image_grid_thw"].tolist() == [list(grid)]
    torch.testing.assert_close(patches, target["pixel_values"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_frames", "fps", "expected"),
    [
        (81, 16, 10),  # 10.125
        (81, 8, 20),
        (90, 16, 12),  # 11.25
        (49, 8, 12),  # 12.25
        (33, 16, 4),  # 4.125
        (17, 16, 4),  # at least 4
        (5, 16, 4),
        (3, 16, 2),  # as many pairs as there are
        (2, 16, 2),
        (5000, 1, 768),
        (25, 10, 4),  # 5: half of it is rounded to an even number, as Python does
    ],
)
def test_frames_are_chosen_evenly(num_frames, fps, expected):
    frames = choose_frames(num_frames, fps, 2.0)
    assert len(frames) == expected and frames[0] == 0 and frames[-1] == num_frames - 1
    steps = frames.diff()
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (448, 448, [448, 448]),
        (480, 832, [336, 588]),  # too large: sides are rounded down
        (64, 64, [336, 336]),  # too small: sides are rounded up
        (320, 512, [308, 504]),
        (100, 1000, [112, 1008]),
        (20, 12000, [28, 10948]),  # a side of at least 28, whatever the shape
    ],
)
def test_frames_are_resized_to_a_multiple_of_28(height, width, expected):
    assert choose_size(height, width, 28, 128 * 28**2, 448 * 448) == expected


def test_the_frame_rate_is_needed_and_counts(original):
    terms, paths = parse_reward("videoalign"), {"videoalign": original[0]}
    video = torch.rand(1, 16, 3, 88, 96)
    rewards = [load_rewards(terms, paths, size=(88, 96, 16), fps=fps) for fps in (4, 8)]
    slow, fast = (reward(video, [""]).total.item() for reward in rewards)
    assert slow != pytest.approx(fast, rel=1e-3)
    assert not rewards[0].mean_over_frames
    with pytest.raises(ValueError, match="reward 'videoalign' needs the frame rate of the videos"):
        load_rewards(terms, paths, size=(88, 96, 16))
    with pytest.raises(ValueError, match="reward 'videoalign' scores whole videos, not images"):
        load_rewards(terms, paths, size=(88, 96))


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("prompt_template.py", None, "holds no prompt_template.py"),
        ("prompt_template.py", lambda text: text.replace("VQ_", "V_"), "prompt_template.py' has no text DETAILED"),
        ("prompt_template.py", lambda text: text[:-5], "prompt_template.py': cannot be read: unterminated"),
        ("model_config.json", None, "holds no model_config.json"),
        (
            "model_config.json",
            lambda text: text.replace("uniform", "multi_pts"),
            "sample_type is 'multi_pts', and only",
        ),
        ("model_config.json", lambda text: text.replace("TA_std", "TA"), "model_config.json': has no entry 'TA_std'"),
        ("model_config.json", lambda text: text.replace("inference_", ""), "has no entry 'inference_config'"),
        ("base/config.json", None, "base' holds no config.json"),
        ("base/tokenizer.json", None, "base' holds no tokenizer.json or vocab.json"),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, file, change, problem):
    path = folder / file
    content = path.read_text()
    path.unlink()
    if change is not None:
        path.write_text(change(content))
    with pytest.raises(ValueError, match=rf"^reward 'videoalign' cannot be loaded: .*{problem}") as error:
        load_reward("videoalign", path=str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("base_model.model.rm_head.weight", r"missing \['rm_head.weight'\]"),
        ("base_model.model.model.embed_tokens.weight", "missing .*embed_tokens"),
        ("base_model.model.visual.merger.mlp.0.weight", r"wrong shape .*model.visual.merger.mlp.0.weight \(1, 2\)"),
        ("extra", r"unexpected \['extra'\]"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(layout, key, problem, originals, tmp_path):
    folder = shutil.copytree(originals[layout][0], tmp_path / "videoalign")
    checkpoint = folder / "checkpoint-20"
    file = next(checkpoint.glob("*.pth"))
    state = torch.load(file, weights_only=True)
    state.pop(key, None)
    if "missing" not in problem:
        state[key] = torch.zeros(1, 2)
    torch.save(state, file)
    with pytest.raises(ValueError, match=f"checkpoint-20.*does not fit: .*{problem}"):
        load_reward("videoalign", path=str(folder))
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="checkpoint-3' holds no model.pth or adapter_model.safetensors"):
        load_reward("videoalign", path=str(folder))
    os.rmdir(folder / "checkpoint-3")
    with pytest.raises(ValueError, match="videoalign' holds no checkpoint-N"):
        load_reward("videoalign", path=str(folder))


def test_without_a_folder_the_missing_file_is_named():
    with pytest.raises(ValueError, match="prompt_template.py is not on the Hub: download KwaiVGI/VideoReward"):
        load_reward("videoalign")


def test_short_videos_and_special_tokens_in_prompts_are_refused(original):
    reward = load_reward("videoalign", path=original[0])
    reward.fps = 8
    with pytest.raises(ValueError, match="videoalign reads pairs of frames, and these videos have one"):
        reward(torch.rand(1, 1, 3, 56, 56), [""])
    with pytest.raises(ValueError, match=r"the prompt 'a <\|TA_reward\|>' contains the special token <\|TA_reward\|>"):
        reward(torch.rand(1, 4, 3, 56, 56), ["a <|TA_reward|>"])


def test_rank_stabilized_lora_has_another_scale(folder):
    config = json.loads((folder / "model_config.json").read_text())
    before = load_reward("videoalign", path=str(folder), dtype=torch.float64).network.state_dict()
    config["peft_lora_config"]["use_rslora"] = True
    (folder / "model_config.json").write_text(json.dumps(config))
    after = load_reward("videoalign", path=str(folder), dtype=torch.float64).network.state_dict()
    config["peft_lora_config"]["lora_alpha"] = 0
    (folder / "model_config.json").write_text(json.dumps(config))
    without = load_reward("videoalign", path=str(folder), dtype=torch.float64).network.state_dict()
    key = "language_model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(after[key] - without[key], 2 * (before[key] - without[key]))  # sqrt(r) = 2
