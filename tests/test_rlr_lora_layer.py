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
"""The layers of a LoRA in training give what peft's give, in every precision, and their gradients add up in float32."""

import pytest
import torch
from accelerate import Accelerator
from diffusion_models.adapters import add_lora, lora_disabled, restore_lora, save_lora
from diffusion_models.lora_layer import LoraLinear
from peft import LoraConfig
from rlr_models import PROMPTS
from rlr_testing import forget_accelerator, tiny_model, widened_norms
from rlr_training.optimizer import averaged, make_optimization, optimizer_step
from rlr_utils.zeroth_order import WeightPerturbation
from torch._dynamo.testing import CompileCounterWithBackend
from train_rlr_sd import parse_args

from diffusers.training_utils import cast_training_params


LAYERS, NUM_STEPS = ["to_q", "to_k", "to_v", "to_out.0"], 3


def add_pefts(model):
    """The same LoRA of peft's own layers."""
    model.network.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS))
    cast_training_params(model.network, dtype=torch.float32)


def add_ours(model):
    add_lora(model, rank=4, alpha=8, layers=LAYERS)


def with_lora(dtype, add=add_ours):
    """(model, the matrices of its LoRA, which are always the same random ones)."""
    model = tiny_model(dtype=dtype)
    add(model)
    matrices, generator = trainable(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))
    return model, matrices


def trainable(model):
    return [p for p in model.network.parameters() if p.requires_grad]


def inputs(seed=0):
    """The latents and cotangents of `NUM_STEPS` steps."""
    return torch.randn(2, NUM_STEPS, 2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def predict(model, x, network=None):
    conditions = {"prompt_embeds": model.embed(PROMPTS[:2])["prompt_embeds"].to(model.network.dtype)}
    return model.call(model.network if network is None else network, x, torch.tensor(500), conditions, {})


def swept(model, network=None, seed=0):
    """(predictions, gradients of the latents, gradients of the matrices) of some steps, each as a vector."""
    model.network.zero_grad()
    predictions, gradients = [], []
    latents = torch.float64 if model.network.dtype == torch.float64 else torch.float32
    for x, cotangent in inputs(seed).to(latents).unbind(1):
        x.requires_grad_()
        prediction = predict(model, x, network).to(latents)
        prediction.backward(cotangent)
        predictions.append(prediction.detach())
        gradients.append(x.grad)
    return [vector(tensors) for tensors in (predictions, gradients, [p.grad for p in trainable(model)])]


def vector(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def expected():
    """What peft gives in float32, for each of some seeds."""
    model, _ = with_lora(torch.float32, add_pefts)
    return [swept(model, seed=seed) for seed in range(3)]


@pytest.fixture
def half():
    return with_lora(torch.bfloat16)


def half_prediction(matrices):
    """What a new model in half precision predicts with these matrices."""
    model, own = with_lora(torch.bfloat16)
    with torch.no_grad():
        torch._foreach_copy_(own, matrices)
        return predict(model, inputs()[0, 0])


# One layer and one network


def test_in_float64_prediction_and_gradients_are_those_of_peft():
    results = []
    for add in (add_ours, add_pefts):
        model, _ = with_lora(torch.float32, add)
        model.network.double()
        results.append(swept(model))
    assert all(error(*pair) < 1e-12 for pair in zip(*results))


def test_in_float32_they_differ_by_rounding_alone(expected):
    assert all(error(*pair) < 1e-6 for pair in zip(swept(with_lora(torch.float32)[0]), expected[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_error_is_no_larger_than_under_autocast(expected, dtype):
    """Beyond a fifth, on average over the seeds; as on a GPU, where autocast leaves normalisations in float32."""
    errors = []
    for add in (add_ours, add_pefts):
        model, _ = with_lora(dtype, add)
        with torch.autocast("cpu", dtype, enabled=add is add_pefts), widened_norms():
            found = [swept(model, seed=seed) for seed in range(len(expected))]
        errors.append([sum(map(error, *pair)) for pair in zip(zip(*found), zip(*expected))])
    assert all(0 < own < 1.2 * other for own, other in zip(*errors))


def test_gradients_of_all_steps_add_up_in_float32(half):
    """A thousandth of the first gradient is lost when it is added in bfloat16."""
    model, matrices = half
    x, cotangent = (values[0] for values in inputs())
    for factor in (1, *[2**-10] * 8):
        predict(model, x).backward(factor * cotangent.bfloat16())
    total = vector([p.grad for p in matrices])
    model.network.zero_grad()
    predict(model, x).backward(cotangent.bfloat16())
    once = vector([p.grad for p in matrices])
    torch.testing.assert_close(total, (1 + 8 * 2**-10) * once, rtol=1e-6, atol=1e-9)
    assert total.dtype == torch.float32


def test_the_network_of_the_base_model_is_itself(half):
    model, x = half[0], inputs()[0, 0]
    base, without = tiny_model(dtype=torch.bfloat16), predict(model, x)
    with lora_disabled(model):
        assert torch.equal(predict(model, x), predict(base, x))
    assert torch.equal(predict(model, x), without) and not torch.equal(without, predict(base, x))


def test_several_adapters_are_those_of_peft():
    """Each layer adds them all, which is left to peft."""
    predictions = []
    for add in (add_ours, add_pefts):
        model, _ = with_lora(torch.float32, add)
        torch.manual_seed(0)
        model.network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "other")
        model.network.set_adapters(["default", "other"], [0.5, 2.0])
        both = predict(model, inputs()[0, 0])
        model.network.set_adapters(["default"], [0.5])
        predictions += [both, predict(model, inputs()[0, 0])]
    assert torch.equal(predictions[0], predictions[2]) and error(predictions[1], predictions[3]) < 1e-6
    assert error(predictions[0], predictions[1]) > 1e-3


def test_checkpointed_blocks_give_the_same_gradients(half):
    plain = swept(half[0])
    model, _ = with_lora(torch.bfloat16)
    model.network.enable_gradient_checkpointing()
    model.network.train()
    assert all(torch.equal(*pair) for pair in zip(swept(model), plain))


def test_a_compiled_network_in_half_precision_has_one_graph_and_the_same_gradients(half):
    plain = swept(half[0])
    model, matrices = with_lora(torch.bfloat16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    network = torch.compile(model.network, backend=counter)
    assert all(error(*pair) < 1e-2 for pair in zip(swept(model, network), plain))
    graphs = counter.frame_count
    with torch.no_grad():
        matrices[1].add_(1)
    predict(model, inputs()[0, 0].requires_grad_(), network)
    assert counter.frame_count == graphs == 1


# When the matrices change


def test_the_matrices_are_cast_once_until_they_change(half):
    model, matrices = half
    layer = next(module for module in model.network.modules() if isinstance(module, LoraLinear))
    predict(model, inputs()[0, 0])
    first = layer.copies
    predict(model, inputs()[0, 1])
    assert layer.copies is first and {copy.dtype for copy in first} == {torch.bfloat16}
    with torch.no_grad():
        matrices[-1].add_(1)
    predict(model, inputs()[0, 0])
    assert layer.copies is not first


@pytest.mark.parametrize("flags", [[], ["--use_8bit_adam"]])
def test_an_optimizer_step_reaches_the_network(half, flags):
    model, matrices = half
    forget_accelerator()
    accelerator = Accelerator(cpu=True)
    args = parse_args(["--learning_rate", "0.1", "--max_train_steps", "1", *flags])
    optimization = make_optimization(args, accelerator, matrices)
    swept(model)
    before = predict(model, inputs()[0, 0])
    optimizer_step(accelerator, optimization)
    with torch.no_grad():
        after = predict(model, inputs()[0, 0])
    assert torch.equal(after, half_prediction(matrices)) and not torch.equal(after, before)


def test_the_moving_average_reaches_the_network_and_leaves_it_again(half):
    model, matrices = half
    forget_accelerator()
    args = parse_args(["--ema_decay", "0.5", "--max_train_steps", "1"])
    optimization = make_optimization(args, Accelerator(cpu=True), matrices)
    averages = [0.5 * matrix.detach() for matrix in matrices]
    optimization.ema.shadow_params = averages
    with torch.no_grad():
        before = predict(model, inputs()[0, 0])
        with averaged(optimization):
            inside = predict(model, inputs()[0, 0])
        assert torch.equal(predict(model, inputs()[0, 0]), before)
    assert torch.equal(inside, half_prediction(averages)) and not torch.equal(inside, before)


@torch.no_grad()
def test_a_loaded_checkpoint_and_a_perturbation_reach_the_network(half, tmp_path):
    model, matrices = half
    before = predict(model, inputs()[0, 0])
    save_lora(model, tmp_path)
    with WeightPerturbation(matrices, 0.1, 0, [1]).applied(1):
        inside = predict(model, inputs()[0, 0])
        assert torch.equal(inside, half_prediction(matrices)) and not torch.equal(inside, before)
    assert torch.equal(predict(model, inputs()[0, 0]), before)
    matrices[0].add_(1)
    assert not torch.equal(predict(model, inputs()[0, 0]), before)
    restore_lora(model, tmp_path)
    assert torch.equal(predict(model, inputs()[0, 0]), before)


def test_a_graph_that_was_kept_stays_valid_when_the_matrices_change(half):
    model, matrices = half
    x, cotangent = inputs()[:, 0]
    predict(model, x).backward(cotangent.bfloat16())
    expected = [p.grad for p in matrices]
    model.network.zero_grad()
    kept = predict(model, x)
    with torch.no_grad():
        torch._foreach_mul_(matrices, 2)
        predict(model, x)
    kept.backward(cotangent.bfloat16())
    assert all(torch.equal(p.grad, other) for p, other in zip(matrices, expected))
