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
"""What is not on the device all the time: the weights of blocks, the VAE; and what a run takes of its memory."""

import json
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusion_models import load_model
from diffusion_models.quantize import stored_bytes
from rlr_chains import gradients
from rlr_flow_models import FLOW_FOLDERS
from rlr_models import FOLDERS, PROMPTS, add_random_lora, chain_of
from rlr_testing import TINY_SD, tiny_model, train
from rlr_training import memory, offload, trial
from rlr_training.errors import is_out_of_memory
from rlr_training.evaluation import load_base
from rlr_training.memory import Footprint, LiveBytes, brought_bytes, footprint, warn_if_too_much
from rlr_training.offload import Visit, offload_blocks, pinned, repeated_whole
from rlr_training.scoring import images_that_fit
from rlr_training.trial import settle_memory
from rlr_utils import backward_sweep, full_bp, rollout
from rlr_video_models import tiny_wan, tiny_wan_a14b
from rlr_video_models_other import tiny_animatediff, tiny_cogvideox, tiny_ltx
from train_rlr_sd import parse_args

from diffusers.hooks import HookRegistry


VIDEO_FOLDERS = {make.__name__: make for make in (tiny_wan, tiny_wan_a14b, tiny_animatediff, tiny_cogvideox, tiny_ltx)}
SIZES = {"tiny_cogvideox": (32, 32, 9), "tiny_ltx": (32, 32, 9)}


@pytest.fixture
def move_away(monkeypatch):
    """`move_away(blocks)` stands in for the CPU of a machine with a GPU: there, weights are NaN, and those that are brought
    are themselves. Returns weak references to all that has been brought."""

    def move(blocks):
        frozen, visits = [p for block in blocks for p in block.parameters() if not p.requires_grad], []
        values = {id(weight): weight.detach().clone() for weight in frozen}
        for weight in frozen:
            weight.data.fill_(float("nan"))

        def bring(weight, device):
            copy = torch.nn.Parameter(values[id(weight)].clone(), requires_grad=False)
            visits.append(weakref.ref(copy))
            return copy

        monkeypatch.setattr(offload, "brought", bring)
        return visits

    return move


def swept(model, size):
    chain = chain_of(model, 3, size=size)
    x_T = torch.randn(model.latents_shape(len(PROMPTS), size), generator=torch.Generator().manual_seed(0))
    trajectory = rollout(chain, x_T, torch.Generator().manual_seed(1))
    backward_sweep(chain, trajectory, full_bp(3), reward_grad=torch.ones_like(x_T))
    return trajectory.latents[0], gradients(model.network)


@pytest.mark.parametrize("name", [*FOLDERS, *FLOW_FOLDERS, *VIDEO_FOLDERS])
def test_blocks_whose_weights_rest_elsewhere_have_the_same_gradient(name, move_away):
    """For every family; nothing that was brought is there after the sweep."""
    folder = {**FOLDERS, **FLOW_FOLDERS, **VIDEO_FOLDERS}[name]()
    size, results = SIZES.get(name, (32, 32, 5) if name in VIDEO_FOLDERS else (32, 32)), []
    for is_offloaded in (False, True):
        model = load_model(str(folder))
        for network in model.networks.values():
            add_random_lora(network)
        if is_offloaded:
            offload_blocks(model.network, model.blocks, torch.device("cpu"))
            visits = move_away(model.blocks)
        results.append(swept(model, size))
    (x_0, expected), (x_0_again, found) = results
    assert len(visits) > 0 and expected.norm() > 0
    torch.testing.assert_close(x_0_again, x_0)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    frozen = [p for block in model.blocks for p in block.parameters() if not p.requires_grad]
    assert all(p.isnan().all() for p in frozen) and all(copy() is None for copy in visits)


def test_a_block_that_fails_leaves_no_copies():
    """Such as one for which memory runs out."""

    class Block(torch.nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    block = Block(2, 2).requires_grad_(False)
    weight = block.weight
    HookRegistry.check_if_exists_or_initialize(block).register_hook(Visit(block, torch.device("cpu")), "visit")
    with pytest.raises(torch.OutOfMemoryError):
        block(torch.ones(2))
    assert block.weight is weight


def test_page_locked_memory_is_taken_in_powers_of_two(monkeypatch):
    """To which torch rounds it up; weights keep their values, and share buffers."""
    monkeypatch.setattr(offload, "BUFFER", 2**12)
    weights = [
        torch.randn(size, dtype=dtype) for size in (10, 300, 700, 900, 5000, 3) for dtype in (torch.half, torch.float)
    ]
    expected = [weight.clone() for weight in weights]
    pinned(weights, pin_memory=False)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(weights, expected))
    buffers = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights}
    assert all(size & (size - 1) == 0 for size in buffers.values())
    small = [size for size in buffers.values() if size <= 2**12]
    assert len(small) == 4 and sum(small) < 2 * sum(one.nbytes for one in weights if one.nbytes <= 2**12)


@pytest.mark.parametrize(
    "flags", [["--offload_blocks"], ["--vae_offload"], ["--guidance_batching", "split"], ["--gradient_checkpointing"]],
    ids=" ".join,
)  # fmt: skip
def test_what_saves_memory_changes_no_number_of_a_run(tmp_path, monkeypatch, flags, plain_run):
    """Nor of its comparison at the end, whose blocks rest on the CPU as well."""
    offloaded, whole = [], offload.offload_blocks
    monkeypatch.setattr(offload, "offload_blocks", lambda *args: offloaded.append(whole(*args)))
    lines = train(tmp_path / "out", "--num_eval_images", "2", *flags)
    expected_lines, expected_results = plain_run
    for line, expected in zip(lines, expected_lines, strict=True):
        assert line["reward_mean"] == pytest.approx(expected["reward_mean"], rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    for name in ("base", "tuned"):
        assert results[name]["mean"] == pytest.approx(expected_results[name]["mean"], rel=1e-4)
    assert len(offloaded) == 2 * ("--offload_blocks" in flags)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Its metrics, and its comparison at the end."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    lines = train(folder, "--num_eval_images", "2")
    return lines, json.loads((folder / "evaluation.json").read_text())


# Memory


def step_bytes(model, batch_size, is_split):
    """Bytes that a swept step takes at most."""
    chain = chain_of(model, 3, prompts=(PROMPTS * 3)[:batch_size])
    chain.split_guidance = is_split
    with LiveBytes() as live:
        chain.mean(3, torch.zeros(batch_size, 4, 8, 8, requires_grad=True)).sum().backward()
    model.network.zero_grad()
    return live.peak


def test_guidance_in_two_calls_takes_half_the_memory_and_a_batch_takes_that_of_its_images():
    model = tiny_model()
    add_random_lora(model.network)
    one, two, split = step_bytes(model, 1, False), step_bytes(model, 2, False), step_bytes(model, 2, True)
    assert two == pytest.approx(2 * one, rel=0.1)
    assert split < 0.6 * two


@pytest.mark.parametrize(
    ("asked", "fitting", "settled"),
    [
        (("auto", "auto"), 0, ("off", "joint")),
        (("auto", "auto"), 1, ("off", "split")),
        (("auto", "auto"), 2, ("on", "joint")),
        (("auto", "auto"), 3, ("on", "split")),
        (("auto", "auto"), 4, ("on", "split")),  # the least that there is
        (("off", "auto"), 5, ("off", "split")),
        (("auto", "joint"), 1, ("on", "joint")),
        (("on", "split"), 5, ("on", "split")),
    ],
)
def test_of_the_settings_the_first_that_fits_is_taken(monkeypatch, asked, fitting, settled):
    """Each is tried with the very call that a step makes, until memory suffices."""
    PartialState(cpu=True)  # for the log
    model, tried = tiny_model(), []
    add_random_lora(model.network)
    args = SimpleNamespace(gradient_checkpointing=asked[0], guidance_batching=asked[1], train_batch_size=2)
    args.height = args.width = 32

    def has_room(run, device):
        with LiveBytes() as live:
            run()
        tried.append(live.peak)
        return len(tried) > fitting

    monkeypatch.setattr(trial, "has_room", has_room)
    chain = chain_of(model, prompts=PROMPTS[:2])
    settle_memory(args, model, chain, lambda chain: chain.conditioned_on(chain.conditions, chain.negative))
    assert (args.gradient_checkpointing, args.guidance_batching) == settled
    assert chain.split_guidance == (settled[1] == "split")
    assert model.network.is_gradient_checkpointing == (settled[0] == "on")
    assert tried == sorted(tried, reverse=True)


def test_weights_that_come_for_a_step_are_counted_once_whatever_the_batch():
    """Those of one block at a time. With it a step takes at most as much more."""
    costs, args = [], SimpleNamespace(height=32, width=32, pretrained_model_name_or_path=TINY_SD, shard=False)
    for is_offloaded in (False, True):
        args.offload_blocks, model = is_offloaded, tiny_model()
        add_random_lora(model.network)
        if is_offloaded:
            offload_blocks(model.network, model.blocks, torch.device("cpu"))
        model.network.enable_gradient_checkpointing(repeated_whole)
        costs.append(trial.try_model(args, model, chain_of(model, prompts=PROMPTS[:1]), None))
    brought = brought_bytes(args, model)
    assert costs[0].swept_bytes < costs[1].swept_bytes + brought <= costs[0].swept_bytes + brought
    assert brought == max(stored_bytes(block) - lora_bytes(block) for block in model.blocks)


def lora_bytes(module):
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def test_as_many_images_are_decoded_as_fit_into_half_of_what_one_leaves():
    assert [images_that_fit(100, spare) for spare in (-50, 0, 199, 200, 1000, 10**6)] == [1, 1, 1, 2, 6, 16]


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_libraries_run_out_of_memory_with_errors_of_their_own(words):
    assert is_out_of_memory(RuntimeError(words)) and not is_out_of_memory(RuntimeError("CUDA error: no kernel image"))


def test_without_a_gpu_nothing_is_tried():
    def never():
        raise AssertionError

    assert trial.has_room(never, torch.device("cpu"))


@pytest.mark.parametrize("vae_offload", [False, True])
@pytest.mark.parametrize("reward_offload", [False, True])
def test_the_footprint_is_that_of_the_flags(vae_offload, reward_offload):
    model, judge = tiny_model(), torch.nn.Linear(1000, 1000)
    args = SimpleNamespace(
        **{"vae_offload": vae_offload, "reward_offload": reward_offload, "keep_graphs": 2, "height": 32, "width": 32},
        **{"offload_blocks": False, "shard": False},
        **{"train_batch_size": 3, "gradient_accumulation_steps": 5, "num_inference_steps": 4, "decode_batch_size": 2},
    )
    expected = footprint(args, model, [judge], None, swept_bytes=10**6, scored_bytes=10**5)
    network, vae, reward = map(stored_bytes, (model.network, model.pipeline.vae, judge))
    assert reward == 4 * (1000 * 1000 + 1000)
    moved = vae_offload * vae + reward_offload * reward
    assert expected.weights == network + vae + reward - moved
    assert expected.scoring == 2 * 10**5 + moved
    assert expected.sweep == 3 * 10**6 * (1 + 5 * 2)
    assert expected.latents == 5 * 3 * (2 * 4 + 1) * 4 * 8 * 8 * 4
    assert Footprint(1, 2, 3, 4).peak == 7
    args.offload_blocks = True
    resting = sum(map(stored_bytes, model.blocks))
    offloaded = footprint(args, model, [judge], None, 10**6, 0)
    assert offloaded.weights == expected.weights - resting > 0
    assert offloaded.sweep == expected.sweep + max(map(stored_bytes, model.blocks))


def test_the_plan_says_what_a_run_takes(tmp_path, capsys):
    train(tmp_path / "out", "--max_train_steps", "1", "--num_eval_images", "0")
    (row,) = re.findall(r"memory per device +(.*)", capsys.readouterr().out)
    pattern = (
        r"about ([\d.]+) MiB = ([\d.]+) MiB weights \+ ([\d.]+) MiB latents \+ the larger of ([\d.]+) MiB for a swept"
    )
    peak, weights, latents, sweep = map(float, re.match(pattern, row).groups())
    assert peak == pytest.approx(weights + latents + sweep, abs=0.2) and sweep > 1 and weights > 1


@pytest.mark.parametrize(
    ("flags", "takes"),
    [([], 4), (["--mixed_precision", "bf16"], 2), (["--quantize", "int8"], 1), (["--offload_blocks"], None)],
    ids=str,
)
def test_a_network_that_does_not_fit_is_named_before_it_is_read(monkeypatch, caplog, flags, takes):
    """What it takes is known from the headers of its files."""
    PartialState(cpu=True)  # for the warning
    monkeypatch.setattr(memory, "gpu_bytes", lambda: 2**20)
    if takes == 1:
        pytest.importorskip("torchao")
    folder = FOLDERS["StableDiffusionXLPipeline"]()
    args = parse_args(["--pretrained_model_name_or_path", folder, *flags])
    model = load_base(args, torch.bfloat16 if takes == 2 else torch.float32)
    size = (takes or 0) * sum(p.numel() for p in model.network.parameters())
    expected = f"the weights of the network take {size / 2**20:.1f} MiB, and the GPU has 1.0 MiB"
    assert (expected in caplog.text) == (takes is not None) and caplog.text.count("the GPU has") == (takes is not None)
    warn_if_too_much(Footprint(1, 2, 3, 2**21))
    assert "about 2.0 MiB will be needed, and the GPU has 1.0 MiB" in caplog.text
