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
"""`load_reward` for every reward: the common interface, the original's scores, and independent references."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import REWARDS, load_reward, parse_reward, parse_reward_paths
from reward_models.clip import preprocess_clip
from reward_models.images import read_image
from rlr_testing import PARITY, TINY_AESTHETIC, TINY_CLIP
from rlr_tiny_rewards import save_imagereward, save_tiny_rewards
from safetensors.torch import load_file
from transformers import CLIPModel


PROMPTS = ['a red "seven"', 'a blue "two"', 'a cyan "nine"']  # ocr reads what is quoted


@pytest.fixture(scope="module")
def tiny_paths(tmp_path_factory):
    return save_tiny_rewards(tmp_path_factory.mktemp("rewards"))


def random_batch(reward, batch):
    """Random images (B, 3, 32, 32), or videos (B, 2, 3, 32, 32) if the reward takes them."""
    if hasattr(reward, "fps"):
        reward.fps = 8
    return torch.rand(batch, *((2,) if getattr(reward, "takes_videos", False) else ()), 3, 32, 32)


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "remote"])  # which needs a server
def test_scores_are_one_number_per_image_and_prompt(name, tiny_paths):
    reward = load_reward(name, path=tiny_paths.get(name))
    images = random_batch(reward, 3).requires_grad_(reward.differentiable)
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    assert scores.requires_grad == reward.differentiable
    if reward.differentiable:
        if isinstance(reward, torch.nn.Module):
            assert not any(p.requires_grad for p in reward.parameters()) and not reward.training
        (grad,) = torch.autograd.grad(scores.sum(), images)
        assert grad.flatten(1).abs().amax(1).min() > 0
    one_by_one = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in REWARDS if name != "remote"])  # which needs a server
def test_invalid_images_and_prompts_are_refused(name, tiny_paths):
    reward = load_reward(name, path=tiny_paths.get(name))
    image = random_batch(reward, 1)
    kind, shape = ("videos", "B, F, 3, H, W") if image.dim() == 5 else ("images", "B, 3, H, W")
    for bad in (image * 2 - 1, image + 0.5, image * float("nan")):
        with pytest.raises(ValueError, match=rf"{kind} must lie in \[0, 1\], but their values range from"):
            reward(bad, ["a"])
    with pytest.raises(ValueError, match=f"1 {kind} with 2 prompts"):
        reward(image, ["a", "b"])
    with pytest.raises(ValueError, match=rf"3, 32, 32\) are not \({shape}\)"):
        reward(image[0], ["a"])


@pytest.mark.parametrize("name", ["aesthetic", "clip_score", "hpsv2", "hpsv2.1", "pickscore", "imagereward"])
def test_parity_with_the_original(name, tmp_path):
    """Compare with the score and gradient of the original implementation on the same weights, in float64."""
    directory = os.path.join(PARITY, name.removesuffix(".1"))
    if not os.path.isdir(directory):
        pytest.skip(f"no parity fixtures of {name}")
    if name == "hpsv2.1":  # same architecture and formula as hpsv2, another file name
        directory = shutil.copytree(directory, tmp_path / "hpsv2.1")
        os.rename(directory / "HPS_v2_compressed.pt", directory / "HPS_v2.1_compressed.pt")
        directory = str(directory)
    with open(os.path.join(directory, "expected.json")) as file:
        expected = json.load(file)
    images, big_images = (
        [(read_image(os.path.join(directory, f"{stem}_{i}.png")) * 255).round().double() / 255 for i in range(2)]
        for stem in ("image", "image_big")
    )
    reward = load_reward(name, path=directory, dtype=torch.float64)
    images = torch.cat(images).requires_grad_()
    scores = reward(images, expected["prompts"])
    target = torch.tensor(expected["score"], dtype=torch.float64)
    assert (scores - target).abs().max() <= 1e-6 * target.abs().max()
    (grad,) = torch.autograd.grad(scores.sum(), images)
    target = torch.from_numpy(np.load(os.path.join(directory, "expected_grad.npz"))["grad"]).double()
    assert (grad - target).abs().max() <= 1e-5 * target.abs().max()
    for i, image in enumerate(big_images):
        score = reward(image, expected["prompts"][i : i + 1])
        assert abs(score.item() - expected["score_big"][i]) <= expected["tolerance"]["score_big_abs"]


def test_hpsv2_and_pickscore_are_scaled_clip_scores(tiny_paths):
    """The same CLIP, loaded as a transformers model and as an open_clip checkpoint."""
    images, prompts = torch.rand(2, 3, 32, 32).double(), PROMPTS[:2]
    clip_score, pickscore = (
        load_reward(name, path=TINY_CLIP, dtype=torch.float64) for name in ("clip_score", "pickscore")
    )
    cosine = clip_score(images, prompts)
    padded = clip_score(torch.nn.functional.pad(images[..., 8:24, :], (0, 0, 8, 8)), prompts)
    for name in ("hpsv2", "hpsv2.1"):
        reward = load_reward(name, path=tiny_paths[name], dtype=torch.float64)
        torch.testing.assert_close(reward(images, prompts), cosine, rtol=1e-12, atol=0)
        torch.testing.assert_close(reward(images[..., 8:24, :], prompts), padded, rtol=1e-12, atol=0)
    scale = load_file(os.path.join(TINY_CLIP, "model.safetensors"))["logit_scale"].double().exp()
    torch.testing.assert_close(pickscore(images, prompts), scale * cosine, rtol=1e-12, atol=0)


def test_aesthetic_equals_its_parts_called_by_hand():
    images = torch.rand(2, 3, 32, 32).double()
    clip = CLIPModel.from_pretrained(TINY_CLIP, dtype=torch.float64)
    expected = torch.nn.functional.normalize(clip.get_image_features(preprocess_clip(images, 32)).pooler_output)
    head = load_file(os.path.join(TINY_AESTHETIC, "aesthetic_head.safetensors"))
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ head[f"layers.{layer}.weight"].double().T + head[f"layers.{layer}.bias"]
    reward = load_reward("aesthetic", path=TINY_AESTHETIC, dtype=torch.float64)
    torch.testing.assert_close(reward(images, ["", ""]), expected[:, 0], rtol=1e-12, atol=0)


def test_imagereward_equals_its_parts_called_by_hand(tmp_path):
    vision, text, head = save_imagereward(tmp_path)
    images = torch.rand(2, 3, 32, 32)
    reward = load_reward("imagereward", path=str(tmp_path))
    states = vision(preprocess_clip(images, 32)).last_hidden_state
    expected = []
    for state, prompt in zip(states, ["a fox", "badger"]):
        ids = reward.tokenizer(prompt, return_tensors="pt").input_ids  # one prompt at a time, without padding
        h = text(input_ids=ids, encoder_hidden_states=state[None]).last_hidden_state[0, 0]
        for weight, bias in zip(head[::2], head[1::2]):
            h = weight @ h + bias
        expected.append((h - 0.16717362830052426) / 1.0333394966054072)
    torch.testing.assert_close(reward(images, ["A fox", "badger"]), torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_jpeg_rewards_are_the_size_of_the_file():
    images = torch.rand(1, 3, 48, 32)
    buffer = io.BytesIO()
    Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=95)
    size = len(buffer.getvalue()) / 1000
    assert load_reward("jpeg_incompressibility")(images, [""]).item() == pytest.approx(size)
    assert load_reward("jpeg_compressibility")(images, [""]).item() == pytest.approx(-size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_heads_and_scores_in_float32(dtype, tiny_paths):
    prompts = PROMPTS[:2]
    for name, path in tiny_paths.items():
        reward, full = (load_reward(name, path=path, dtype=d) for d in (dtype, torch.float32))
        images = [random_batch(x, 2) for x in (reward, full)][0]
        scores = reward(images, prompts)
        assert scores.dtype == torch.float32
        assert {p.dtype for key, p in reward.named_parameters() if not key.startswith("head.")} == {dtype}
        assert all(p.dtype == torch.float32 for key, p in reward.named_parameters() if key.startswith("head."))
        scale = getattr(reward, "scale", 1.0)
        assert (scores - full(images, prompts)).abs().max() < 4 * torch.finfo(dtype).eps * max(scale, 1)


def test_sums_and_paths_are_parsed():
    assert parse_reward("aesthetic") == {"aesthetic": (1.0, None, "aesthetic")}
    terms = parse_reward("aesthetic:1, hpsv2.1@refs/pr/1:-.5,a.b:c,d/e.py:f:2,pickscore@v1")
    assert {name: (term.weight, term.revision) for name, term in terms.items()} == {
        "aesthetic": (1.0, None),
        "hpsv2.1": (-0.5, "refs/pr/1"),
        "a.b:c": (1.0, None),
        "d/e.py:f": (2.0, None),
        "pickscore": (1.0, "v1"),
    }
    paths = parse_reward_paths(["aesthetic=a", "hpsv2=c", "aesthetic=b=d"])
    assert paths == {"aesthetic": "b=d", "hpsv2": "c"}


@pytest.mark.parametrize(
    "entry",
    [
        *("beauty", "beauty:2", "aesthetic:high", "aesthetic:nan", "aesthetic:", "", "aesthetic:1:2", "aesthetic@:1"),
        *("my_module:f:high", "my_module:f:", "my_module:"),
    ],
)
def test_parsing_errors_quote_the_whole_entry(entry):
    with pytest.raises(ValueError) as error:
        parse_reward(f"jpeg_compressibility:1,{entry}")
    assert repr(entry) in str(error.value)


def test_repeated_rewards_and_invalid_paths_are_refused():
    with pytest.raises(ValueError, match="'aesthetic:2' repeats"):
        parse_reward("aesthetic:1,aesthetic:2")
    for entry in ("aesthetic", "=dir", "aesthetic=", "beauty=dir"):
        with pytest.raises(ValueError, match=f"'{entry}'"):
            parse_reward_paths([entry])
