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
"""The chain of thought: the same images from the chain of a run and from a pipeline with the callback."""

import json

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.chain_of_thought import ChainOfThought
from diffusion_models.levels import BOUNDARIES, levels_of_steps
from rlr_models import (
    FOLDERS,
    PROMPTS,
    SEEN,
    chain_of,
    plain_pipeline,
    seeded,
    train_on,
    training_generators,
)
from rlr_training.evaluation import EVALUATION_SEED
from rlr_utils import rollout


LEVELS = {"prompt": "a red seven", "coarse": "a green seven", "mid": "a red one", "fine": "a blue two"}


@pytest.mark.parametrize(
    ("num_steps", "boundaries", "expected"),
    [
        (5, (0.4, 0.8), [0, 0, 1, 1, 2]),
        (4, BOUNDARIES, [0, 0, 1, 2]),
        (3, (0.0, 0.5), [1, 1, 2]),
        (3, (0.0, 0.0), [2, 2, 2]),
        (3, (1.0, 1.0), [0, 0, 0]),
        (1, (0.5, 0.5), [0]),
    ],
)
def test_levels_change_at_their_shares_of_the_chain(num_steps, boundaries, expected):
    assert levels_of_steps(num_steps, boundaries) == expected


@pytest.mark.parametrize("boundaries", [(0.7, 0.3), (-0.1, 0.5), (0.5, 1.1)])
def test_boundaries_that_are_not_in_order_are_refused(boundaries):
    with pytest.raises(ValueError, match="the boundaries .* are not two shares of the chain in ascending order"):
        levels_of_steps(4, boundaries)


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


@pytest.fixture(scope="module")
def pipeline(folder):
    return plain_pipeline(folder)


def images_of(pipeline, prompts, generators, guidance_scale, thought=None, **options):
    """What a pipeline draws, with or without the callback."""
    options = {"guidance_scale": guidance_scale, "eta": 1.0, "generator": generators, **options}
    if thought is not None:
        options.update(callback_on_step_end=thought, **thought.inputs)
    return pipeline(prompts, **options).images


@pytest.mark.parametrize("boundaries", [(0.4, 0.8), (0.0, 0.4)])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_callback_draws_the_images_of_a_chain_with_conditions_by_step(
    folder, pipeline, guidance_scale, boundaries
):
    """Five steps: two coarse, two mid and one fine, or two mid and three fine."""
    levels = [PROMPTS, [f"a yellow {prompt.split()[-1]}" for prompt in PROMPTS], PROMPTS[::-1]]
    model = load_model(folder)
    chain = chain_of(model, 5, guidance_scale=guidance_scale)
    by_level = [model.embed(level) for level in levels]
    order = levels_of_steps(5, boundaries)
    chain = chain.conditioned_on([by_level[level] for level in order], chain.negative)
    generators = seeded(range(3))
    expected = rollout(chain, model.draw_latents(chain, 3, (32, 32), generators), generators).latents[0]
    thought = ChainOfThought(pipeline, *levels, num_inference_steps=5, boundaries=boundaries)
    assert thought.levels == order and thought.first == levels[order[0]]
    options = {"num_inference_steps": 5, "output_type": "latent"}
    found = images_of(pipeline, thought.first, seeded(range(3)), guidance_scale, thought, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = images_of(pipeline, thought.first, seeded(range(3)), guidance_scale, **options)
    assert (plain - found).abs().max() > 0.05


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_the_images_of_a_run_are_those_of_the_pipeline_with_the_callback(tmp_path, folder, pipeline, guidance_scale):
    """Four steps of three levels, in training and when base and tuned model are compared at the end."""
    (tmp_path / "levels.jsonl").write_text(json.dumps(LEVELS))
    flags = ["--guidance_scale", str(guidance_scale), "--num_inference_steps", "4", "--max_train_steps", "1"]
    flags += ["--prompts", str(tmp_path / "levels.jsonl"), "--num_eval_images", "2"]
    SEEN.clear()
    train_on(folder, tmp_path / "out", *flags)
    (seen, prompts), (base, _), (tuned, _) = SEEN[-3:]
    assert list(prompts) == [LEVELS["prompt"]] * 2
    levels = [[LEVELS[level]] * 2 for level in ("coarse", "mid", "fine")]
    thought = ChainOfThought(pipeline, *levels, num_inference_steps=4)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    images = images_of(pipeline, thought.first, training_generators(1), guidance_scale, thought, **options)
    torch.testing.assert_close(seen, images, rtol=1e-4, atol=1e-4)
    fixed = seeded([EVALUATION_SEED, EVALUATION_SEED + 1])
    compared = images_of(pipeline, thought.first, fixed, guidance_scale, thought, **options)
    torch.testing.assert_close(base, compared, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().max() > 0
    # Every condition changes with the level, such as the pooled embeddings of SDXL.
    for name in thought.names:
        others = ChainOfThought(pipeline, *levels, num_inference_steps=4)
        others.names = [one for one in others.names if one != name]
        without = images_of(pipeline, thought.first, training_generators(1), guidance_scale, others, **options)
        assert (without - images).abs().max() > 1e-3
