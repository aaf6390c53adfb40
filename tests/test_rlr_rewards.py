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
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import REWARDS, load_reward, load_rewards, parse_reward, parse_reward_paths
from rlr_testing import PARITY, TINY_AESTHETIC
from safetensors.torch import load_file, save_file


TINY_CLIP = os.path.join(TINY_AESTHETIC, "clip")


def images_in(directory, pattern, dtype):
    pictures = [Image.open(os.path.join(directory, pattern.format(i))).convert("RGB") for i in range(2)]
    return [torch.from_numpy(np.asarray(p)).permute(2, 0, 1)[None].to(dtype) / 255 for p in pictures]


@pytest.mark.parametrize("name", ["aesthetic", "clip_score"])
def test_parity_with_the_original(name):
    """Score and gradient of the original implementation on the same weights, in float64."""
    directory = os.path.join(PARITY, name)
    if not os.path.isdir(directory):
        pytest.skip(f"no parity fixtures of {name}")
    with open(os.path.join(directory, "expected.json")) as file:
        expected = json.load(file)
    reward = load_reward(name, path=directory, dtype=torch.float64)
    images = torch.cat(images_in(directory, "image_{}.png", torch.float64)).requires_grad_()
    scores = reward(images, expected["prompts"])
    target = torch.tensor(expected["score"], dtype=torch.float64)
    assert (scores - target).abs().max() <= 1e-6 * target.abs().max()
    (grad,) = torch.autograd.grad(scores.sum(), images)
    target = torch.from_numpy(np.load(os.path.join(directory, "expected_grad.npz"))["grad"]).double()
    assert (grad - target).abs().max() <= 1e-5 * target.abs().max()
    for i, image in enumerate(images_in(directory, "image_big_{}.png", torch.float64)):
        score = reward(image, expected["prompts"][i : i + 1])
        assert abs(score.item() - expected["score_big"][i]) <= expected["tolerance"]["score_big_abs"]


def tiny_rewards(names):
    paths = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP}
    return {name: load_reward(name, path=paths.get(name)) for name in names}


@pytest.mark.parametrize("name", REWARDS)
def test_the_contract(name):
    reward = tiny_rewards([name])[name]
    images = torch.rand(3, 3, 32, 32).requires_grad_(reward.differentiable)
    scores = reward(images, ["a red seven", "a blue two", "a cyan nine"])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert scores.requires_grad == reward.differentiable
    if reward.differentiable:
        assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
        (grad,) = torch.autograd.grad(scores.sum(), images)
        assert grad.abs().amax((1, 2, 3)).min() > 0
    one_by_one = torch.cat(
        [reward(images[i : i + 1], [p]) for i, p in enumerate(["a red seven", "a blue two", "a cyan nine"])]
    )
    torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-5)


def test_clip_score_pairs_image_and_prompt():
    from rlr_testing import tiny_pipeline

    prompts = ["a red seven", "a blue two"]
    images = tiny_pipeline()(
        prompts,
        num_inference_steps=20,
        eta=1.0,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    reward = tiny_rewards(["clip_score"])["clip_score"]
    right, wrong = reward(images, prompts), reward(images, prompts[::-1])
    assert (right > wrong + 0.1).all()


def test_images_of_other_sizes_are_resized_and_cropped_as_clip_does():
    """Against the PIL preprocessor of transformers, which the reward replaces by tensor operations."""
    from reward_models.base import preprocess_clip
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(TINY_CLIP)
    pixels = (torch.rand(3, 9, 7).repeat_interleave(8, 1).repeat_interleave(11, 2) * 255).byte()
    expected = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
    result = preprocess_clip(pixels[None].float() / 255, 32)
    assert result.shape == (1, 3, 32, 32)
    assert (result - expected).abs().mean() < 0.01


def test_half_precision_keeps_the_head_and_the_score_in_float32():
    reward = load_reward("aesthetic", path=TINY_AESTHETIC, dtype=torch.bfloat16)
    images = torch.rand(2, 3, 32, 32)
    scores = reward(images, ["", ""])
    assert reward.clip.dtype == torch.bfloat16 and scores.dtype == torch.float32
    full = load_reward("aesthetic", path=TINY_AESTHETIC)(images, ["", ""])
    assert (scores - full).abs().max() < 0.5


def test_jpeg_size_is_the_files_size():
    images = torch.rand(1, 3, 48, 32)
    buffer = io.BytesIO()
    Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    size = len(buffer.getvalue()) / 1000
    assert load_reward("jpeg_incompressibility")(images, [""]).item() == pytest.approx(size)
    assert load_reward("jpeg_compressibility")(images, [""]).item() == pytest.approx(-size)


def test_a_weighted_sum_keeps_its_parts_apart():
    rewards = load_rewards(
        parse_reward("aesthetic:2,clip_score,jpeg_compressibility:0.5"),
        {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP, "pickscore": "nowhere"},
    )
    assert not rewards.differentiable and rewards.has_gradient
    images, prompts = torch.rand(2, 3, 32, 32), ["a red seven", "a blue two"]
    scores = rewards(images, prompts)
    single = {name: reward(images, prompts) for name, reward in tiny_rewards(list(scores.members)).items()}
    torch.testing.assert_close(scores.differentiable, 2 * single["aesthetic"] + single["clip_score"])
    torch.testing.assert_close(scores.black_box, 0.5 * single["jpeg_compressibility"])
    torch.testing.assert_close(scores.members["jpeg_compressibility"], single["jpeg_compressibility"])


@pytest.mark.parametrize("result", [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0])])
def test_scores_that_are_no_numbers_are_refused(result):
    reward = lambda images, prompts: result  # noqa: E731
    reward.differentiable = False
    from reward_models import WeightedSum

    with pytest.raises(ValueError, match="reward 'mine' returned (nan for prompt 'b'|inf for prompt 'a')"):
        WeightedSum({"mine": (1.0, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])


@pytest.mark.parametrize("result", [torch.ones(3), torch.ones(2, 1), torch.tensor(1.0), [1.0, 2.0]])
def test_scores_of_another_shape_are_refused(result):
    reward = lambda images, prompts: result  # noqa: E731
    reward.differentiable = False
    from reward_models import WeightedSum

    with pytest.raises(ValueError, match=r"reward 'mine' returned .* instead of a tensor of shape \(2,\)"):
        WeightedSum({"mine": (1.0, reward)})(torch.rand(2, 3, 8, 8), ["a", "b"])


def test_parsing_sums_and_paths():
    assert parse_reward("aesthetic") == {"aesthetic": 1.0}
    assert parse_reward("aesthetic:1, clip_score:-.5") == {"aesthetic": 1.0, "clip_score": -0.5}
    assert parse_reward_paths(["aesthetic=a", "other=c", "aesthetic=b=d"]) == {"aesthetic": "b=d", "other": "c"}


@pytest.mark.parametrize(
    "entry", ["beauty", "beauty:2", "aesthetic:high", "aesthetic:nan", "aesthetic:", "", "aesthetic:1:2"]
)
def test_bad_entries_are_quoted_whole(entry):
    with pytest.raises(ValueError) as error:
        parse_reward(f"jpeg_compressibility:1,{entry}")
    assert repr(entry) in str(error.value)


def test_a_repeated_reward_and_a_bad_path_entry_are_refused():
    with pytest.raises(ValueError, match="'aesthetic:2' repeats"):
        parse_reward("aesthetic:1,aesthetic:2")
    for entry in ("aesthetic", "=dir", "aesthetic="):
        with pytest.raises(ValueError, match=f"'{entry}'"):
            parse_reward_paths([entry])


def test_unknown_rewards_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown reward 'beauty', known are: aesthetic, clip_score"):
        load_reward("beauty")
    with pytest.raises(ValueError, match="'aesthetic=/no/such/folder': no such folder"):
        load_reward("aesthetic", path="/no/such/folder")
    with pytest.raises(ValueError, match="'jpeg_compressibility=.*': this reward has no files"):
        load_reward("jpeg_compressibility", path=str(tmp_path))
    with pytest.raises(ValueError, match="holds no aesthetic_head.safetensors nor aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))


def test_a_clip_without_its_tokenizer_or_cut_short_is_refused(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY_CLIP, folder)
    (folder / "tokenizer.json").rename(folder / "elsewhere.json")
    with pytest.raises(ValueError, match="holds no tokenizer.json nor vocab.json"):
        load_reward("clip_score", path=str(folder))
    (folder / "elsewhere.json").rename(folder / "tokenizer.json")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="reward 'clip_score' cannot be loaded"):
        load_reward("clip_score", path=str(folder))


def head_folder(tmp_path):
    shutil.copytree(TINY_CLIP, tmp_path / "clip")
    return load_file(os.path.join(TINY_AESTHETIC, "aesthetic_head.safetensors"))


def test_a_head_may_be_a_pth_file(tmp_path):
    torch.save(head_folder(tmp_path), tmp_path / "aesthetic_head.pth")
    images = torch.rand(2, 3, 32, 32)
    score = load_reward("aesthetic", path=str(tmp_path))(images, ["", ""])
    torch.testing.assert_close(score, load_reward("aesthetic", path=TINY_AESTHETIC)(images, ["", ""]))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    head_folder(tmp_path)
    torch.save({"layers.0.weight": Bomb()}, tmp_path / "aesthetic_head.pth")
    with pytest.raises(ValueError, match="aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))
    (tmp_path / "aesthetic_head.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="aesthetic_head.pth"):
        load_reward("aesthetic", path=str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_head_that_does_not_fit_is_described(tmp_path):
    state = head_folder(tmp_path)
    state["layers.7.weight"] = torch.zeros(1, 8)
    state["layers.9.bias"] = state.pop("layers.0.bias")
    save_file(state, tmp_path / "aesthetic_head.safetensors")
    with pytest.raises(ValueError, match=r"missing \['layers.0.bias'\].*\['layers.9.bias'\].*\['layers.7.weight'\]"):
        load_reward("aesthetic", path=str(tmp_path))
    (tmp_path / "aesthetic_head.safetensors").write_bytes(b"truncated")
    with pytest.raises(ValueError, match="aesthetic_head.safetensors"):
        load_reward("aesthetic", path=str(tmp_path))
