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
"""--shard: two ranks that share a network take the steps of two that have one each, with about half of its weights."""

import json
import os
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from diffusion_models import load_model
from diffusion_models.adapters import add_lora, lora_disabled
from diffusion_models.quantize import stored_bytes
from rlr_flow_models import tiny_sd3
from rlr_models import seeded
from rlr_processes import call_on_two_ranks, run_two_ranks, torchrun
from rlr_testing import ASSETS, BASE, LORA, TINY_CLIP, TINY_SD, metrics_of, refused, same_adapter, tiny_pipeline
from rlr_training import finish
from rlr_training.checkpoints import NEW_FLAGS, STATE_FILE, check_same_run, read_state
from rlr_training.errors import RunError
from rlr_training.memory import brought_bytes
from rlr_training.optimizer import average_gradients
from rlr_training.processes import refuse_engines
from rlr_training.sharding import check_sharding, gathered_at_once, shard
from rlr_training.trial import try_model
from rlr_utils import RLRStep
from rlr_video_models import tiny_wan, tiny_wan_a14b
from safetensors.torch import load_file
from torch.nn.utils import parameters_to_vector
from train_rlr_sd import parse_args


NUM_STEPS = 5
RLR = {"sweep_fraction": 0.5}
# {what it is called: settings of RLRStep}
ESTIMATORS = {
    "rlr": RLR,
    "rlr mixed": {**RLR, "mixing": 0.5},
    "rlr kl": {**RLR, "kl_weight": 0.1},
    "rlr branches": {"branches": 2},
    "rlr_paper": {"estimator": "rlr_paper"},
    "full_bp": {"estimator": "full_bp"},
    "truncated_bp": {"estimator": "truncated_bp", "truncation_steps": 2},
    "draft_lv": {"estimator": "draft_lv"},
    "alignprop": {"estimator": "alignprop"},
    "ddpo": {"estimator": "ddpo", "sweep_fraction": 0.5},
}
FEW = ("rlr", "rlr kl", "ddpo")
SPARING = {"checkpointing": True, "split": True}
# {model: the estimators that are compared, and options}
CASES = {
    "U-Net": {"estimators": list(ESTIMATORS), "layers": ["to_q", "to_out.0", "proj_in", "conv1"]},
    "U-Net, sparing memory": {"estimators": FEW[:2], **SPARING},
    "Stable Diffusion 3": {"estimators": FEW, "counted": True},
    "Wan 2.1, sparing memory": {"estimators": FEW, "counted": True, **SPARING},
    "Wan 2.1 in bf16": {"estimators": FEW, "dtype": "bfloat16"},
    "Wan 2.2 A14B": {"estimators": (*FEW, "alignprop")},
}


SIZE_FLAGS = ("height", "width", "num_frames")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """{case: what `compare` has found}, of one launch of two ranks."""
    folder = tmp_path_factory.mktemp("compared")
    folders = dict.fromkeys(CASES, TINY_SD)
    wan = tiny_wan()  # made here: a rank but the first would save none
    folders |= {
        "Stable Diffusion 3": tiny_sd3(),
        "Wan 2.1, sparing memory": wan,
        "Wan 2.1 in bf16": wan,
        "Wan 2.2 A14B": tiny_wan_a14b(),
    }
    call_on_two_ranks(compare_all, folders, folder / "found.json", log=folder / "found")
    return json.loads((folder / "found.json").read_text())


def compare_all(folders, path):
    """Write {case: what `compare` finds}; on each of two ranks."""
    accelerator = Accelerator(cpu=True)
    found = {name: compare(accelerator, folders[name], CASES[name]) for name in CASES}
    if accelerator.is_main_process:
        path.write_text(json.dumps(found))


def compare(accelerator, folder, case):
    """What the network takes on this rank, and its gradients, in parts and as a whole.

    Returns:
        {"bytes": share of its bytes; "brought": what is gathered at a time, as a share of them; "buffers": of that, what a
        swept step takes more in parts; "differences": {estimator: relative difference of gradients}}.
    """
    gradients, sizes, swept = [], [], []
    for sharded in (False, True):
        torch.manual_seed(0)
        model = load_model(folder, dtype=getattr(torch, case.get("dtype", "float32")))
        model.network.to(memory_format=torch.contiguous_format)  # as `shard` has it; another one rounds differently
        add_lora(model, rank=2, alpha=2, layers=case.get("layers") or model.lora_layers.split(","))
        trainable = [p for p in model.network.parameters() if p.requires_grad]
        for parameter in trainable:
            parameter.data.normal_(std=0.1)  # of a new LoRA half of the gradients are zero
        if case.get("checkpointing"):
            model.network.enable_gradient_checkpointing()
        if sharded:
            shard(model, accelerator)
        sizes.append(stored_bytes(model.network))
        step = partial(gradient_of, accelerator, model, trainable, case.get("split", False))
        gradients.append({name: step(ESTIMATORS[name]) for name in case["estimators"]})
        args = SimpleNamespace(
            **{"shard": sharded, "offload_blocks": False, **dict(zip(SIZE_FLAGS, size_for(model)))},
            **{"pretrained_model_name_or_path": folder, "mixed_precision": "no"},
        )
        if case.get("counted"):
            chain = chain_for(accelerator, model, case.get("split", False))
            swept.append(try_model(args, model, chain, None).swept_bytes)
    brought, (whole, parts) = brought_bytes(args, model), gradients
    differences = {name: ((parts[name] - whole[name]).norm() / whole[name].norm()).item() for name in whole}
    shares = {"bytes": sizes[1] / sizes[0], "brought": brought / sizes[0]}
    if swept:
        shares["buffers"] = (swept[1] - swept[0]) / brought
    return {**shares, "differences": differences}


def gradient_of(accelerator, model, trainable, split, settings):
    """The average over the ranks of the gradient of an optimizer step, of other images on each."""
    rank = accelerator.process_index
    random.seed(rank)  # what each rank draws by itself must not matter
    torch.manual_seed(rank)
    rlr = RLRStep(
        NUM_STEPS,
        differentiable="branches" not in settings,
        parameters=trainable,
        base_model=partial(lora_disabled, model),
        gather=accelerator.gather,
        shared_seed=0,
        **settings,
    )
    chain, generators = chain_for(accelerator, model, split), seeded([rank])
    size = size_for(model)
    rlr.backward([rlr.rollout(chain, model.draw_latents(chain, 1, size, generators), score, generators)])
    average_gradients(accelerator, trainable)
    gradient = parameters_to_vector([p.grad for p in trainable])
    for parameter in trainable:
        parameter.grad = None
    return gradient


def size_for(model):
    return (32, 32, 5) if hasattr(model, "temporal_factor") else (32, 32)


def chain_for(accelerator, model, split):
    """Of the prompt of this rank."""
    chain = model.make_chain(model.network, NUM_STEPS, size_for(model), **noise_everywhere(model))
    chain.split_guidance = split
    prompt = ["a red seven", "a two"][accelerator.process_index]
    return chain.conditioned_on(model.embed([prompt]), model.embed_negative(None))


def noise_everywhere(model):
    """The options of a chain that adds noise at its last step, too."""
    return {"final_noise": 0.03} if "final_noise" in model.sampling_options else {}


def score(x_0, with_gradient):
    """-(mean of (x_0 - 1)^2) of each image."""
    rewards = -(x_0 - 1).square().flatten(1).mean(1)
    return rewards, -2 * (x_0 - 1) / x_0[0].numel() if with_gradient else None


def test_sharded_networks_have_the_gradient_of_whole_ones_for_half_of_the_weights(compared):
    """The adapter is whole on each rank; a scale of one row is on the first. Of the weights two parts are gathered at a time;
    a swept step takes what it does on whole networks, and buffers to gather them. One test, for one launch of two ranks."""
    for case, found in compared.items():
        assert set(found["differences"]) == set(CASES[case]["estimators"])
        assert max(found["differences"].values()) < 1e-5, (case, found)
        assert 0.5 < found["bytes"] < 0.6, (case, found)
        assert 0.1 < found["brought"] < 0.9, (case, found)
        assert ("buffers" in found) == CASES[case].get("counted", False)
        assert 0.2 < found.get("buffers", 0.5) < 1, (case, found)


def test_no_large_part_of_a_unet_is_gathered_for_a_whole_call():
    """What is left to the network itself beside its blocks and levels."""
    model = load_model(os.path.join(ASSETS, "tiny-emoji"))
    *parts, network = gathered_at_once(model)
    in_parts = {parameter for part in parts for parameter in part.parameters()}
    assert network is model.network
    assert sum(p.numel() for p in in_parts) > 0.9 * sum(p.numel() for p in network.parameters())


# Draws


class CountedChain:
    """x_{k-1} = parameter x_k + noise, which counts its calls."""

    num_steps = NUM_STEPS

    def __init__(self):
        self.parameter, self.calls = torch.nn.Parameter(torch.tensor(0.9)), []

    def sigma(self, k):
        return 0.5

    def mean(self, k, x):
        self.calls.append((k, len(x)))
        return self.parameter * x

    def repeat(self, i, copies):
        return self

    def renoise(self, x_0, noise):
        return x_0 + noise


def calls_of(settings, seed, **shared):
    """The calls of two optimizer steps of a rank whose global generator has a seed."""
    random.seed(seed)
    chain = CountedChain()
    rlr = RLRStep(
        NUM_STEPS,
        "branches" not in settings,
        parameters=[chain.parameter],
        base_model=torch.no_grad,
        **settings,
        **shared,
    )
    for _ in range(2):
        rlr.backward([rlr.rollout(chain, torch.randn(2, 3), score) for _ in range(2)])
    return chain.calls


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranks_with_a_shared_seed_make_the_same_calls(estimator):
    settings = ESTIMATORS[estimator]
    first, second = (calls_of(settings, seed, shared_seed=0) for seed in (1, 2))
    assert first == second
    draws_steps = estimator not in ("full_bp", "truncated_bp", "draft_lv")
    assert (calls_of(settings, 1) != calls_of(settings, 2)) == draws_steps
    assert (calls_of(settings, 1, shared_seed=1) != first) == draws_steps


def test_shared_draws_go_on_from_a_checkpoint():
    def draws(rlr):
        return [rlr.draw_schedule().stop_after for _ in range(20)]

    rlr, resumed = (RLRStep(50, estimator="alignprop", shared_seed=seed) for seed in (0, 1))
    before = draws(rlr)
    state = json.loads(json.dumps(rlr.state_dict()))
    expected = draws(rlr)
    resumed.load_state_dict(state)
    assert draws(resumed) == expected != before
    with pytest.raises(ValueError, match="the state lacks draws"):
        resumed.load_state_dict(RLRStep(50, estimator="alignprop").state_dict())


# Runs


FLAGS = [
    *(
        "--shard",
        "--num_inference_steps",
        "6",
        "--sweep_fraction",
        "0.5",
        "--learning_rate",
        "1e-3",
        "--ema_decay",
        "0.9",
    ),
    *("--checkpointing_steps", "2", "--heldout_reward", "clip_score", "--num_heldout_images", "4"),
    *(
        "--heldout_steps",
        "2",
        "--feature_model",
        TINY_CLIP,
        "--validation_prompts",
        "a red seven",
        "--validation_steps",
        "2",
    ),
    *("--num_validation_images", "3"),
]


def test_a_sharded_run_is_resumed_to_the_same_adapter_which_the_pipeline_loads(tmp_path):
    """With held-out rewards, validation, and at the end three images of either model, shared out as two and two."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_two_ranks(straight, *FLAGS, "--max_train_steps", "4")
    run_two_ranks(resumed, *FLAGS, "--max_train_steps", "2")
    resume = ["--max_train_steps", "4", "--resume_from_checkpoint", "latest", "--num_eval_images", "3"]
    run_two_ranks(resumed, *FLAGS, *resume)
    assert same_adapter(straight, resumed) and same_adapter(straight / "ema", resumed / "ema")
    for key in ("reward_mean", "grad_norm", "gamma_mean"):
        assert [line[key] for line in metrics_of(resumed)] == [line[key] for line in metrics_of(straight)]
    results = json.loads((resumed / "evaluation.json").read_text())
    assert results["num_images"] == 3 and results["gain"]["mean"] != 0
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(resumed, weight_name=LORA)
    loaded = {name: p for name, p in pipeline.unet.named_parameters() if "lora_B" in name}
    assert sum(key.endswith(".lora.up.weight") for key in load_file(resumed / LORA)) == len(loaded) > 0
    assert all(p.abs().max() > 0 for p in loaded.values())

    checkpoint = str(resumed / "checkpoint-4")
    config = read_state(checkpoint)["config"]
    check_same_run(config, checkpoint)
    with pytest.raises(ValueError, match="shard was True and is False"):
        check_same_run({**config, "shard": False}, checkpoint)


def test_a_checkpoint_of_a_version_without_the_flag_is_of_whole_networks(tmp_path):
    (tmp_path / STATE_FILE).write_text(json.dumps({"config": {"heldout_reward": None}}))
    config = {"heldout_reward": None, **NEW_FLAGS}
    check_same_run(config, str(tmp_path))
    with pytest.raises(ValueError, match="shard was False and is True;"):
        check_same_run({**config, "shard": True}, str(tmp_path))


def test_a_rank_that_fails_in_the_comparison_ends(monkeypatch):
    """The other ranks would wait for its calls."""

    def failing(args, dtype):
        raise ValueError("the shards of the base model do not fit")

    monkeypatch.setattr(finish, "load_base", failing)
    args = SimpleNamespace(num_eval_images=2, validation_prompts=None, shard=True, mixed_precision="no")
    run = SimpleNamespace(
        sampler=SimpleNamespace(prompts=["a two"]), accelerator=SimpleNamespace(num_processes=2, process_index=1)
    )
    with pytest.raises(RunError, match="^the comparison .* has failed: the shards of the base model do not fit$"):
        finish.compare_at_the_end(args, run, 1)


def test_a_rank_that_is_killed_ends_all(tmp_path):
    """In the second step, within which the other rank waits for its weights."""
    (tmp_path / "killing.py").write_text(
        "import os, signal\n\ncalls = 0\n\ndef killing(images, prompts):\n    global calls\n    calls += 1\n"
        "    if os.environ['RANK'] == '1' and calls > 5:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return images.mean((1, 2, 3))\n\nkilling.differentiable = True\n"
    )
    result = torchrun(
        tmp_path / "out", "--shard", "--reward", f"{tmp_path}/killing.py:killing", "--max_train_steps", "1000"
    )
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert len(metrics_of(tmp_path / "out")) == 1


# What is refused


@pytest.mark.parametrize(
    "flags",
    [
        ["--compile"],
        ["--cuda_graphs"],
        ["--keep_graphs", "2"],
        ["--offload_blocks"],
        ["--quantize", "int8"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_shared_is_refused(capsys, flags):
    with pytest.raises(SystemExit):
        parse_args([*BASE, "--shard", *flags])
    assert capsys.readouterr().err.strip() == f"train_rlr_sd.py: error: --shard and --{flags[0][2:]}: give one of them"


def test_what_each_rank_would_decide_by_itself_is_decided():
    args = parse_args([*BASE, "--shard"])
    assert (args.keep_graphs, args.gradient_checkpointing, args.guidance_batching) == (0, "off", "joint")
    args = parse_args([*BASE, "--shard", "--gradient_checkpointing", "--guidance_batching", "split"])
    assert (args.gradient_checkpointing, args.guidance_batching) == ("on", "split")


def test_one_process_has_nobody_to_share_with(tmp_path, capsys):
    message = refused(tmp_path / "out", capsys, "--shard")
    assert "--shard shares the network out among several processes, and there is one" in message


def test_accelerates_compiler_is_refused():
    accelerator = SimpleNamespace(
        num_processes=2, state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=DynamoBackend.INDUCTOR))
    )
    check_sharding(SimpleNamespace(shard=False), accelerator)
    with pytest.raises(ValueError, match="^--shard and accelerate's compiler: give one of them$"):
        check_sharding(SimpleNamespace(shard=True), accelerator)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_other_ways_to_shard_are_refused_with_this_one_as_the_remedy(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="is not supported: .* --shard of the training scripts"):
        refuse_engines(None)
