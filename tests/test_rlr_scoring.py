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
"""The rewards of latents: in parts, on a loss scale, kept on the CPU, of one's own, with a smaller decoder."""

import json
from types import SimpleNamespace

import pytest
import rlr_training.before_after
import rlr_training.scoring
import torch
from accelerate import PartialState
from reward_models import load_rewards, parse_reward
from rlr_models import chain_of
from rlr_testing import LORA, TINY_AESTHETIC, TINY_CLIP, same_adapter, tiny_model, train
from rlr_training.errors import RunError
from rlr_training.scoring import BatchScorer, score_latents
from rlr_training.services import checking_rewards
from rlr_utils import RLRStep
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers import AutoencoderTiny


PROMPTS = ["a red one", "a blue two", "a green three"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def tiny_rewards(text):
    return load_rewards(parse_reward(text), {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP})


@pytest.fixture(scope="module")
def rewards():
    """The sum of two rewards with a gradient and of a black box."""
    return tiny_rewards("aesthetic,clip_score:5,jpeg_compressibility:.1")


@pytest.mark.parametrize(("decode_batch_size", "scale"), [(1, 1.0), (2, 1024.0), (3, 1.0)])
def test_latents_are_scored_in_parts_and_on_a_scale_to_the_same_result(model, rewards, decode_batch_size, scale):
    """Against the pipeline's own decoder, and autograd through all images at once."""
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scores, gradient = score_latents(model.decode, rewards, latents, PROMPTS, decode_batch_size, True, scale)
    x = latents.clone().requires_grad_()
    vae = model.pipeline.vae
    images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    result = rewards(images.detach(), PROMPTS)
    smooth = tiny_rewards("aesthetic,clip_score:5")(images.detach(), PROMPTS, True)
    expected = torch.autograd.grad(images, x, smooth.gradient)[0]
    for name, values in {"total": result.total, "black_box": result.black_box, **result.members}.items():
        torch.testing.assert_close(scores[name], values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    assert scores.keys() == {"total", "black_box", *result.members} and not gradient.requires_grad
    assert score_latents(model.decode, rewards, latents, PROMPTS, decode_batch_size)[1] is None


def scorer_of(model, rewards, **options):
    args = SimpleNamespace(decode_batch_size=2, reward_offload=False)
    return BatchScorer(args, SimpleNamespace(device="cpu", scaler=None), model, rewards, PROMPTS, **options)


def test_a_scorer_keeps_the_scores_of_the_first_latents(model, rewards):
    """Those of the images in which the rollout ends; images that are scored later are not of the step's metrics."""
    scorer, latents = scorer_of(model, rewards), torch.randn(2, 3, 4, 8, 8)
    total, gradient, black_box = scorer(latents[0], True)
    later, none, _ = scorer(latents[1], False)
    assert scorer.scores["total"] is total and not torch.equal(total, later)
    assert scorer.scores.keys() == {"total", "aesthetic", "clip_score", "jpeg_compressibility"}
    assert gradient.shape == latents[0].shape and none is None
    torch.testing.assert_close(black_box, 0.1 * scorer.scores["jpeg_compressibility"])


def test_a_reward_that_fails_ends_the_run(model):
    broken = tiny_rewards("aesthetic")
    broken.modules[0].head.layers[-1].bias.data.fill_(float("nan"))
    with pytest.raises(RunError, match="reward 'aesthetic' returned nan for prompt 'a red one'"):
        scorer_of(model, broken)(torch.randn(3, 4, 8, 8), False)


class Waits(TorchDispatchMode):
    """Counts how often a number is asked for that is on a device."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def checking(rewards):
    """What surrounds the images of a step that are scored with these rewards."""
    return checking_rewards(SimpleNamespace(shard=False), SimpleNamespace(rewards=rewards), 1)


def test_scores_are_checked_once_for_all_images(model):
    """Neither the rewards nor the RLR step ask for a number before that."""
    smooth = tiny_rewards("aesthetic,clip_score:5")
    latents = torch.randn(3, 4, 8, 8)
    with Waits() as waits:
        scorer_of(model, smooth)(latents, True)
    assert waits.number > 6
    with checking(smooth):
        with Waits() as waits:
            scorer_of(model, smooth)(latents, True)
        assert waits.number == 0
    rlr, chain = RLRStep(3), chain_of(model, 3)
    scorer = scorer_of(model, smooth)
    chain = chain.conditioned_on(model.embed(PROMPTS), model.embed([""]))
    with checking(smooth), Waits() as waits:
        rlr.rollout(chain, latents, scorer)
    assert waits.number == 0


@pytest.mark.parametrize("later_fails", [False, True])
def test_what_failed_first_is_named_at_the_end(model, later_fails):
    """Also if something else fails because of it."""
    broken = tiny_rewards("aesthetic,clip_score")
    broken.modules[0].head.layers[-1].bias.data.fill_(float("nan"))
    scored = []
    with pytest.raises(RunError, match="reward 'aesthetic' returned nan for prompt 'a red one'"), checking(broken):
        scored.append(scorer_of(model, broken)(torch.randn(3, 4, 8, 8), False))
        scored.append(scorer_of(model, tiny_rewards("clip_score"))(torch.randn(3, 4, 8, 8), False))
        if later_fails:
            raise KeyError("something else")
    assert len(scored) == 2
    # Afterwards checks are made at once again.
    with pytest.raises(RunError, match="reward 'aesthetic' returned nan"):
        scorer_of(model, broken)(torch.randn(3, 4, 8, 8), False)


def test_what_has_the_wrong_form_fails_at_once(model):
    rewards, reached = tiny_rewards("aesthetic"), False
    rewards.members["aesthetic"] = (1.0, lambda images, prompts: images.mean((2, 3)))
    rewards.members["aesthetic"][1].differentiable = True
    with pytest.raises(RunError, match=r"reward 'aesthetic' returned a tensor of shape \(2, 3\)"), checking(rewards):
        scorer_of(model, rewards)(torch.randn(3, 4, 8, 8), False)
        reached = True
    assert not reached


def test_if_memory_runs_out_fewer_images_are_decoded_at_a_time(model, caplog):
    """The decoder's own error, as of a GPU that holds one image at a time."""
    PartialState(cpu=True)  # for the warning
    smooth, latents, sizes = tiny_rewards("aesthetic"), torch.randn(5, 4, 8, 8), []
    scorer = scorer_of(model, smooth)
    scorer.prompts = [*PROMPTS, *PROMPTS[:2]]
    expected = scorer(latents, True)
    scorer.args.decode_batch_size = smooth.batch_size = 4

    def decode(x_0, vae):
        sizes.append(len(x_0))
        if len(x_0) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.decode(x_0, vae)

    scorer.decode = decode
    total, gradient = scorer(latents, True)
    assert sizes == [4, 2, 1, 1, 1, 1, 1] and scorer.args.decode_batch_size == smooth.batch_size == 1
    assert "out of memory: from now on --decode_batch_size 1" in caplog.text
    torch.testing.assert_close(gradient, expected[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(total, expected[0], rtol=1e-4, atol=1e-4)

    def never(x_0, vae):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer.decode = never
    with pytest.raises(torch.OutOfMemoryError):
        scorer(latents, True)


def test_a_tiny_autoencoder_decodes_the_predicted_images(tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    tiny.save_pretrained(tmp_path / "taesd")
    flags = ["--baseline", "predicted_x0", "--gradient_estimator", "ddpo", "--learning_rate", "1e-3"]
    own = train(tmp_path / "own", *flags)
    other = train(tmp_path / "tiny", *flags, "--baseline_vae", str(tmp_path / "taesd"))
    # The images in which the rollout ends are decoded by the model.
    assert own[0]["reward_mean"] == other[0]["reward_mean"]
    assert not same_adapter(tmp_path / "own", tmp_path / "tiny")


def test_a_reward_of_ones_own(tmp_path, caplog):
    """One with a gradient and one without, in NumPy's double precision, neither declared, with a reward of the project."""
    (tmp_path / "mine.py").write_text(
        "import torch\n\n"
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2)) + torch.tensor(['red' in p for p in prompts])\n\n"
        "def dark(images, prompts):\n    return torch.tensor([-image.numpy().sum(dtype='float64') for image in images])\n"
    )
    red, dark = (f"{tmp_path}/mine.py:{name}" for name in ("red", "dark"))
    with caplog.at_level("INFO"):
        metrics = train(tmp_path / "out", "--reward", f"{red}:3,{dark}:.01,aesthetic", "--learning_rate", "1e-3")
    assert "red', tried on two random images: its scores have a gradient" in caplog.text
    assert "dark', tried on two random images: its scores have no gradient: a black box" in caplog.text
    for line in metrics:
        total = 3 * line[f"{red}_mean"] + 0.01 * line[f"{dark}_mean"] + line["aesthetic_mean"]
        assert line["reward_mean"] == pytest.approx(total, rel=1e-4) and line[f"{dark}_std"] > 0


def test_rewards_are_kept_on_the_cpu_and_score_in_parts_to_the_same_result(tmp_path, monkeypatch):
    """Everything is on the CPU here: whether the rewards are moved shows in what diffusers is asked for."""
    asked = []

    def noted(*modules, device, offload=True, really=rlr_training.scoring.offload_models):
        if any(type(module).__module__.startswith("reward_models") for module in modules):
            asked.append(offload)
        return really(*modules, device=device, offload=offload)

    for module in (rlr_training.scoring, rlr_training.before_after):
        monkeypatch.setattr(module, "offload_models", noted)
    flags = ["--reward", "aesthetic,clip_score:3", "--decode_batch_size", "2", "--num_eval_images", "3"]
    plain = train(tmp_path / "plain", *flags)
    assert asked and not any(asked)
    asked.clear()
    saving = train(tmp_path / "saving", *flags, "--reward_offload", "--reward_batch_size", "1")
    # For a first image, in two steps, and for the images of base and tuned model.
    assert len(asked) == 4 and all(asked)
    for a, b in zip(plain, saving):
        assert a["clip_score_mean"] == pytest.approx(b["clip_score_mean"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("plain", "saving"))
    assert first["tuned"]["mean"] == pytest.approx(second["tuned"]["mean"], rel=1e-3)


def test_a_black_box_in_a_sum_counts_as_it_does_alone(tmp_path):
    """With a differentiable reward of weight zero the black box enters through dR/dx_0, and nothing changes."""
    flags = ["--mixing", "0.5", "--learning_rate", "1e-3"]
    train(tmp_path / "alone", *flags, "--reward", "jpeg_compressibility")
    train(tmp_path / "sum", *flags, "--reward", "aesthetic:0,jpeg_compressibility")
    alone, summed = load_file(tmp_path / "alone" / LORA), load_file(tmp_path / "sum" / LORA)
    for key in alone:
        torch.testing.assert_close(alone[key], summed[key], rtol=1e-4, atol=1e-6)
