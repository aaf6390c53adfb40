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
"""What a run settles about its chains: defaults of the family, noise, and which prompts are encoded before training."""

from types import SimpleNamespace

import pytest
from rlr_training import chains
from rlr_training.chains import encode_prompts_of_run, set_defaults, settle_noise
from rlr_training.prompts import PromptSampler
from rlr_utils import RLRStep


def test_what_is_not_given_is_the_familys_default():
    model = SimpleNamespace(num_inference_steps=28, guidance_scale=7.0, lora_layers="attn.to_q")
    args = SimpleNamespace(num_inference_steps=None, guidance_scale=0.0)  # an evaluation has no layers
    set_defaults(args, model)
    assert vars(args) == {"num_inference_steps": 28, "guidance_scale": 0.0}
    args = SimpleNamespace(num_inference_steps=4, guidance_scale=None, lora_layers=None)
    set_defaults(args, model)
    assert vars(args) == {"num_inference_steps": 4, "guidance_scale": 7.0, "lora_layers": "attn.to_q"}


@pytest.mark.parametrize(
    ("settings", "differentiable", "black_box", "floor"),
    [
        ({}, True, False, 0.0),  # the last step is pathwise
        ({"estimator": "full_bp"}, True, False, 0.0),
        ({}, False, True, 0.03),
        ({}, True, True, 0.03),
        ({"estimator": "ddpo"}, True, False, 0.03),
        ({"kl_weight": 0.1}, True, False, 0.03),
    ],
)
def test_the_last_step_has_noise_where_the_estimator_needs_it(settings, differentiable, black_box, floor):
    rlr = RLRStep(4, differentiable, black_box=black_box, **settings)
    schedule = rlr.draw_schedule()
    model = SimpleNamespace(sampling_options=("eta", "noise", "final_noise"))
    args = SimpleNamespace(eta=None, noise="ddim", final_noise="auto")
    settle_noise(args, model, rlr, schedule)
    assert (args.eta, args.final_noise) == (1.0, floor)
    args = SimpleNamespace(eta=None, noise="flow_sde", final_noise=0.2)
    settle_noise(args, model, rlr, schedule)
    assert (args.eta, args.final_noise) == (0.7, 0.2)
    args = SimpleNamespace(eta=0.5, final_noise="auto")  # as of models that were trained on a schedule of betas
    settle_noise(args, SimpleNamespace(sampling_options=("eta",)), rlr, schedule)
    assert vars(args) == {"eta": 0.5, "final_noise": "auto"}


def encoded(num_prompts, num_steps, rank=0):
    """(the prompts that are encoded before training, those that the run meets from step 3 on)."""
    found, freed = [], []
    embeds = SimpleNamespace(
        encode_all=lambda prompts, show_progress: found.extend(prompts), free_encoders=lambda: freed.append(True)
    )
    steps = {"max_train_steps": 2 + num_steps, "gradient_accumulation_steps": 2}
    args = SimpleNamespace(**steps, train_batch_size=3, prompts=None)
    sampler = PromptSampler([f"prompt {i}" for i in range(num_prompts)], 0, rank, 2)
    encode_prompts_of_run(args, embeds, sampler, ["a held-out one"], first_step=2, show_progress=False)
    met = [prompt for _ in range(2 * (2 + num_steps)) for prompt in sampler.next_batch(3)]
    assert bool(freed) == bool(found)
    return found, met[12:]


@pytest.mark.parametrize("rank", [0, 1])
def test_exactly_the_prompts_that_a_run_will_meet_are_encoded(rank):
    found, met = encoded(num_prompts=100, num_steps=4, rank=rank)
    assert found == [*dict.fromkeys(["prompt 0", *met]), "a held-out one"] and len(met) == 24
    found, met = encoded(num_prompts=5, num_steps=1000, rank=rank)
    assert set(found) == {*met, "a held-out one"} and len(found) == 6


def test_very_many_prompts_are_encoded_when_their_turn_comes(monkeypatch):
    monkeypatch.setattr(chains, "MAX_ENCODED_BEFORE", 20)
    assert len(encoded(num_prompts=100, num_steps=3)[0]) == 20
    assert encoded(num_prompts=100, num_steps=4)[0] == []
