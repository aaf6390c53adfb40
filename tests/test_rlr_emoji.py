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
"""The emoji models: what they draw, how they score it, and that they can be made again."""

import json
import os
import sys
from pathlib import Path

import make_emoji_assets
import pytest
import torch
import torch.nn.functional as F
from emoji_models import measuring
from emoji_models.classifier import HELD_OUT, accuracies, classifier_code, read
from emoji_models.clip import make_clip
from emoji_models.data import BACKGROUNDS, RESOLUTION, STYLE_WORDS, Captions, EmojiImages, caption, random_placement
from emoji_models.measuring import count_distinguishable, draw, load_pipeline
from emoji_models.tokenizer import make_tokenizer
from emoji_models.training import fit
from reward_models import load_reward, load_rewards, parse_reward
from reward_models.clip import preprocess_clip
from rlr_testing import ASSETS
from safetensors import safe_open
from tiny_stable_diffusion import tokenize
from transformers import CLIPModel, CLIPTextModel

from diffusers import StableDiffusionPipeline


TINY_EMOJI, REWARDS, EMOJI = (os.path.join(ASSETS, name) for name in ("tiny-emoji", "tiny-emoji-rewards", "emoji"))
CONCEPT_ACCURACY = os.path.join(REWARDS, "emoji_classifier.py:ConceptAccuracy")


@pytest.fixture(scope="module")
def emoji():
    return EmojiImages(EMOJI)


@pytest.fixture(scope="module")
def real(emoji):
    """256 new images of all concepts."""
    return emoji.batch(256, torch.Generator().manual_seed(11))


@pytest.fixture(scope="module", params=["tiny-emoji", "tiny-emoji-sd3"])
def each_pipeline(request):
    return load_pipeline(ASSETS, request.param)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(ASSETS)


# The models


def test_the_pipelines_draw_what_prompts_ask_for(each_pipeline, emoji):
    styles = torch.arange(64) % 2
    prompts = [caption(c, STYLE_WORDS[s], "blue" if s else "pink") for c, s in zip(emoji.concepts, styles)]
    concept, style, background = read(draw(each_pipeline, prompts, seed=50, size=64), ASSETS)
    assert (concept == torch.arange(64)).float().mean() >= 0.93
    assert (style == styles).float().mean() >= 0.9
    assert (background == torch.where(styles == 1, 1, 4)).float().mean() >= 0.93


def test_seeds_give_different_images(each_pipeline):
    """On one background, whose color would make any two images differ."""
    assert count_distinguishable(draw(each_pipeline, ["a fox on a white background"] * 8, seed=60)) >= 3


def test_the_flow_model_draws_with_any_number_of_zeros_after_a_prompt(emoji):
    """As many as the pipeline appends in place of T5."""
    pipeline, concepts = load_pipeline(ASSETS, "tiny-emoji-sd3"), torch.arange(0, 64, 4)
    images = draw(pipeline, [caption(emoji.concepts[i]) for i in concepts], seed=51, max_sequence_length=256)
    assert (read(images, ASSETS)[0] == concepts).float().mean() >= 0.93


def test_the_flow_model_is_small_and_has_the_autoencoder_of_the_other():
    folder = Path(ASSETS) / "tiny-emoji-sd3"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6_000_000
    weights = "vae/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (Path(TINY_EMOJI) / weights).read_bytes()


def test_the_autoencoder_loses_little(pipeline, real):
    with torch.no_grad():
        images = 2 * real.images - 1
        decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    assert F.mse_loss(decoded, images) <= 0.012


def test_the_files_are_in_float16():
    for folder in (TINY_EMOJI, REWARDS, os.path.join(ASSETS, "tiny-emoji-sd3")):
        for path in Path(folder).rglob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert {file.get_tensor(key).dtype for key in file.keys()} <= {torch.float16, torch.int64}, path


def test_the_float16_files_draw_the_same_images_with_and_without_a_dtype(pipeline):
    plain = StableDiffusionPipeline.from_pretrained(TINY_EMOJI, safety_checker=None)
    assert {plain.unet.dtype, plain.vae.dtype, plain.text_encoder.dtype} == {torch.float32}
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(draw(plain, ["a fox"], seed=0), draw(pipeline, ["a fox"], seed=0))


def test_the_text_encoder_is_the_text_tower_of_the_clip(pipeline):
    tower = CLIPTextModel.from_pretrained(os.path.join(REWARDS, "clip"))
    ids = tokenize(pipeline.tokenizer, ["a 3d fox on a blue background"])
    assert torch.equal(tower(ids)[0], pipeline.text_encoder(ids)[0])
    assert pipeline.tokenizer.decode(ids[0, :10]).split() == (
        "<|startoftext|>a 3 d fox on a blue background <|endoftext|>".split()
    )


def test_the_clip_knows_the_concepts_of_real_images(pipeline, emoji, real):
    clip = CLIPModel.from_pretrained(os.path.join(REWARDS, "clip"))
    with torch.no_grad():
        text = clip.get_text_features(tokenize(pipeline.tokenizer, [caption(c) for c in emoji.concepts])).pooler_output
        embeds = clip.get_image_features(preprocess_clip(real.images, RESOLUTION)).pooler_output
    nearest = (embeds @ F.normalize(text, dim=1).T).argmax(1)
    assert (nearest == real.concepts).float().mean() >= 0.95
    assert clip.projection_dim == 768


def test_the_head_prefers_3d(real):
    scores = load_reward("aesthetic", path=REWARDS)(real.images, [""] * 256)
    assert scores[real.styles == 1].mean() - scores[real.styles == 0].mean() >= 4
    assert ((scores > 5.5) == (real.styles == 1)).float().mean() >= 0.95


def test_the_classifier_reads_emoji_at_shifts_that_its_training_did_not_have(emoji):
    shifted = emoji.batch(500, torch.Generator().manual_seed(12), **HELD_OUT)
    assert min(accuracies(shifted, ASSETS)) >= 0.98
    code = classifier_code(ASSETS)
    assert (code["STYLES"], code["BACKGROUNDS"], code["RESOLUTION"]) == (STYLE_WORDS, list(BACKGROUNDS), RESOLUTION)
    assert code["load_classifier"]()[1] == emoji.concepts


def test_shifts_lie_between_the_least_and_the_largest():
    placement = {"scale": (0.8, 0.8), "tilt": 0.0}
    theta = random_placement(500, torch.Generator().manual_seed(1), (3.0, 5.0), **placement)
    pixels = theta[:, :, 2].abs() * 0.8 * RESOLUTION / 2
    assert 3 <= pixels.min() < 3.1 and 4.9 < pixels.max() <= 5
    assert (theta[:, :, 2] < 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_the_concept_accuracy_is_a_custom_reward_that_says_what_it_does_not_know(emoji, real):
    right = [caption(emoji.concepts[i]) for i in real.concepts[:8]]
    rewards = load_rewards(parse_reward(CONCEPT_ACCURACY), {}, size=(RESOLUTION, RESOLUTION), prompts=right[:2])
    assert not rewards.has_gradient and len(rewards.modules) == 1  # a module: it moves to the device of the rewards
    assert rewards(real.images[:8], right).total.sum() >= 7
    assert rewards(real.images[:8], [*right[1:], right[0]]).total.sum() <= 1
    larger = F.interpolate(real.images[:8], scale_factor=2, mode="nearest")
    assert rewards(larger, [prompt.upper() + "." for prompt in right]).total.sum() >= 7
    for prompt in ("a wolf", "a fox and a cat"):
        with pytest.raises(ValueError, match=f"the prompt '{prompt}' names [02] of the emoji"):
            rewards(real.images[:1], [prompt])


def test_the_files_are_small():
    def size(*names):
        paths = [os.path.join(folder, file) for name in names for folder, _, files in os.walk(name) for file in files]
        return sum(map(os.path.getsize, paths))

    assert size(EMOJI) <= 2e6
    assert size(TINY_EMOJI, REWARDS) <= 22e6
    assert size(ASSETS) <= 48e6


# The tool


def test_captions_name_what_images_show(emoji):
    captions, generator = Captions(emoji.concepts), torch.Generator().manual_seed(13)
    batch = emoji.batch(3000, generator)
    index = captions.index(batch, generator)
    texts = [captions.texts[i] for i in index]
    concept, style, background = (values.tolist() for values in (batch.concepts, batch.styles, batch.backgrounds))
    for text, c, s, b in zip(texts, concept, style, background):
        words = text.split()
        assert emoji.concepts[c] in words
        assert STYLE_WORDS[1 - s] not in words
        assert "background" not in words or text.endswith(f"on a {list(captions.backgrounds)[1 + b]} background")
    assert sum("background" in text for text in texts) / 3000 == pytest.approx(2 / 3, abs=0.03)
    assert sum(any(word in text.split() for word in STYLE_WORDS) for text in texts) / 3000 == pytest.approx(
        0.5, abs=0.03
    )
    true = captions.describe(index[:50], batch)
    assert true[:50].diagonal().all()
    assert not true[:, 0][batch.concepts != batch.concepts[0]].any()
    assert [caption("owl"), caption("unicorn"), caption("owl", "3d", "blue")] == [
        *("an owl", "a unicorn", "a 3d owl on a blue background")
    ]


def test_the_tokenizer_makes_one_token_of_each_word_and_is_the_same_each_time(emoji, pipeline):
    words = ["butterfly", "ladybug", "flamingo", "sunflower", "a", "an"]
    tokenizer = make_tokenizer(words)
    assert [len(tokenizer(word).input_ids) for word in words] == [3] * len(words)
    assert tokenizer.decode(tokenizer("a wolf").input_ids[1:-1]).strip() == "a wolf"
    made = make_clip(emoji.concepts)[1]
    assert made.get_vocab() == make_clip(emoji.concepts)[1].get_vocab() == pipeline.tokenizer.get_vocab()


def test_a_training_that_is_continued_ends_as_one_that_was_not_stopped(tmp_path):
    def run(steps_at_a_time, file):
        for count in steps_at_a_time:
            torch.manual_seed(0)
            model, taken = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(3, 1)), 0

            def loss(generator):
                nonlocal taken
                taken += 1
                if taken > count:
                    raise KeyboardInterrupt
                value = model(torch.randn(4, 3, generator=generator)).square().mean()
                return value, {"error": value}

            try:
                average = fit(model, loss, 6, 1e-2, seed=0, state_file=str(file), save_every=2)
            except KeyboardInterrupt:
                pass
        return average.state_dict(), taken

    whole, steps = run([6], tmp_path / "whole.pt")
    parts, last_steps = run([3, 9], tmp_path / "parts.pt")
    assert steps == 6 and last_steps == 4  # of the three steps, two were kept
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert run([0], tmp_path / "whole.pt")[1] == 0  # it had ended
    with pytest.raises(ValueError, match="whole.pt is of a training of 6 steps, not 9: remove it"):
        fit(torch.nn.Linear(3, 1), None, 9, 1e-2, seed=0, state_file=str(tmp_path / "whole.pt"))


def test_a_trial_does_not_replace_the_models(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_emoji_assets.py", "--quick", "--out", "elsewhere"])
    with pytest.raises(SystemExit):
        make_emoji_assets.main()
    assert "--quick would replace the trained models" in capsys.readouterr().err


def test_all_stages_follow_each_other(tmp_path, monkeypatch, capsys):
    out = tmp_path / "assets"
    (out / "tiny-emoji-rewards").mkdir(parents=True)
    code = os.path.join(REWARDS, "emoji_classifier.py")
    (out / "tiny-emoji-rewards" / "emoji_classifier.py").write_text(open(code, encoding="utf-8").read())
    flags = ["--quick", "--emoji", EMOJI, "--out", str(out), "--work_dir", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["make_emoji_assets.py", *flags])
    for settings in measuring.SETTINGS.values():  # of the images that the cards are about
        monkeypatch.setitem(settings, "num_inference_steps", 2)
    make_emoji_assets.main()
    for made, committed in ((out / "tiny-emoji", TINY_EMOJI), (out / "tiny-emoji-rewards", REWARDS)):
        assert set(os.listdir(made)) - {"__pycache__"} == set(os.listdir(committed)) - {"__pycache__"}
    assert (
        json.loads((out / "tiny-emoji" / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    )
