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
"""Processes and devices: launchers, the noise of every image, precision, memory, the compiler."""

import json
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from rlr_testing import BASE, ROOT, metrics_of, same_adapter, tiny_model, tiny_pipeline, train
from rlr_training import LEFT_OUT
from rlr_training.optimizer import loss_scale
from rlr_training.processes import generators_of, make_accelerator, set_up_logging, to_device
from torch._functorch import config as functorch_config
from train_rlr_sd import parse_args

from diffusers import UNet2DConditionModel


# The noise of every image


def noises_of(seed=0, step=1, num_ranks=1, accumulation=1, batch=2):
    """A number for each image of a step, in the order of micro-batches and ranks, from its generator."""
    args = SimpleNamespace(seed=seed, train_batch_size=batch)
    numbers = []
    for index in range(accumulation):
        for rank in range(num_ranks):
            accelerator = SimpleNamespace(num_processes=num_ranks, process_index=rank)
            numbers += [torch.randn((), generator=g).item() for g in generators_of(args, accelerator, step, index)]
    return numbers


def test_every_image_of_every_step_and_seed_has_noise_of_its_own():
    numbers = [x for seed in (0, 1) for step in (1, 2, 3) for x in noises_of(seed, step, num_ranks=2, accumulation=2)]
    assert len(set(numbers)) == 2 * 3 * 2 * 2 * 2


def test_the_noise_of_an_image_does_not_depend_on_ranks_and_micro_batches():
    whole = noises_of(batch=8)
    for split in ({"batch": 1, "accumulation": 8}, {"batch": 2, "num_ranks": 4}, {"num_ranks": 2, "accumulation": 2}):
        assert noises_of(**split) == whole


def test_a_run_draws_other_noise_at_every_step(tmp_path):
    """Of one prompt, with an adapter that stays as it is."""
    metrics = train(tmp_path, "--max_prompts", "1", "--learning_rate", "1e-30", "--max_train_steps", "3")
    assert len({round(line["reward_mean"], 4) for line in metrics}) == 3


# Precision


def accelerator_of(tmp_path, *flags):
    args = parse_args([*BASE, "--output_dir", str(tmp_path / "out"), *flags])
    return make_accelerator(args), args


def test_the_loss_scale_of_half_precision_starts_at_1024(tmp_path):
    """Of the scaler that accelerate makes on a GPU; at its own default of 2^16 likelihood ratios overflow."""
    accelerator, _ = accelerator_of(tmp_path)
    scaler = torch.amp.GradScaler("cpu", **accelerator.scaler_handler.to_kwargs())
    assert loss_scale(SimpleNamespace(scaler=scaler, device="cpu")) == 1024.0


@pytest.fixture
def tf32():
    """torch's switches for convolutions, on by default, and for matrix products; a test may set them."""
    switches = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    with functorch_config.patch(donated_buffer=True):  # which is set with them
        yield switches
    for switch, value in zip(switches, before):
        switch.allow_tf32 = value


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ([], True),
        (["--kl_weight", "0.1"], False),
        (["--gradient_estimator", "ddpo", "--num_inner_epochs", "2"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_tf32_is_off_where_two_means_of_a_step_are_compared(tmp_path, tf32, flags, allowed):
    """Also for matrix products, where accelerate switches it on with a compiler."""
    for switch in tf32:
        switch.allow_tf32 = True
    accelerator, args = accelerator_of(tmp_path, *flags)
    to_device(args, accelerator, tiny_model(), None)
    assert [switch.allow_tf32 for switch in tf32] == [allowed, allowed]


@pytest.mark.parametrize("flags", [[], ["--allow_tf32"]], ids=" ".join)
def test_tf32_matrix_products_need_their_flag(tmp_path, tf32, flags):
    torch.backends.cuda.matmul.allow_tf32 = False
    accelerator, args = accelerator_of(tmp_path, *flags)
    to_device(args, accelerator, tiny_model(), None)
    assert torch.backends.cuda.matmul.allow_tf32 == bool(flags)


def test_only_messages_that_are_known_to_say_nothing_are_left_out(caplog, capsys):
    """A warning of the same logger is shown, and so are our own messages; of other libraries no information."""
    set_up_logging(is_main_process=True)
    for name, start in LEFT_OUT.items():
        for message in (start.replace(r"`\w+`", "`X`") + " and so on", f"a warning of {name}"):
            logging.getLogger(name).warning(message)
            assert (message in caplog.text + capsys.readouterr().err) == message.startswith("a warning")
    for name, is_shown in (("accelerate.checkpointing", False), ("httpx", False), ("rlr_training.prompts", True)):
        logging.getLogger(name).info(f"information of {name}")
        assert (f"information of {name}" in caplog.text) == is_shown


def test_a_number_of_processes_that_accelerate_does_not_see_is_refused(tmp_path, monkeypatch):
    Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 but accelerate sees 1 processes"):
        accelerator_of(tmp_path)


# Memory


def saved_bytes(function):
    """What autograd keeps for the backward pass of a function."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


@pytest.mark.parametrize("flags", [[], ["--gradient_checkpointing"]], ids=" ".join)
def test_the_decoder_is_always_checkpointed_and_the_network_by_its_flag(tmp_path, flags):
    accelerator, args = accelerator_of(tmp_path, *flags)
    model, network = tiny_model(), None
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    conditions = {"prompt_embeds": torch.randn(1, 16, model.network.config.cross_attention_dim)}
    saved = []
    for _ in range(2):
        saved.append(
            (
                saved_bytes(lambda: model.decode(latents)),
                saved_bytes(lambda: model.call(network or model.network, latents, 1, conditions, {})),
            )
        )
        network = to_device(args, accelerator, model, None)
    (decoder, unet), (decoder_after, unet_after) = saved
    assert decoder_after < decoder / 2
    assert unet_after < unet / 2 if flags else unet_after == unet


def test_too_little_memory_is_reported_with_what_saves_some(tmp_path):
    """Images that are far too large."""
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--resolution", "400000")
    assert "\n" not in stop.value.code
    for part in ("train_rlr_sd.py: error: out of memory", "--train_batch_size", "--gradient_accumulation_steps"):
        assert part in stop.value.code
    assert "--gradient_checkpointing" in stop.value.code and "--preset_low_memory" in stop.value.code


# The compiler


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """The flags of a model with a U-Net of one block, which takes little time to compile."""
    pipeline, folder = tiny_pipeline(), str(tmp_path_factory.mktemp("model"))
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    sizes = {"block_out_channels": [32], "layers_per_block": 1, "mid_block_type": None, "attention_head_dim": 4}
    torch.manual_seed(0)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **blocks, **sizes})
    pipeline.save_pretrained(folder)
    return ["--pretrained_model_name_or_path", folder]


def test_a_compiler_that_fails_gives_a_warning_and_the_run_continues_without(tmp_path, caplog, small_model):
    train(tmp_path / "plain", *small_model)
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}):
        train(tmp_path / "compiled", *small_model, "--compile")
    assert "cannot be compiled and runs as it is: InvalidCxxCompiler" in caplog.text
    assert same_adapter(tmp_path / "compiled", tmp_path / "plain")


def test_a_compiled_network_may_be_compared_with_the_base_model(tmp_path, monkeypatch, small_model):
    """Compiled graphs in C++ or Triton have buffers that may be used once, unless told otherwise."""
    flags = [*small_model, "--kl_weight", "0.1", "--mixing", "0.5", "--learning_rate", "1e-3"]
    plain = train(tmp_path / "plain", *flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    with functorch_config.patch(donated_buffer=True):
        compiled = train(tmp_path / "compiled", *flags)
    assert compiled[1]["kl"] == pytest.approx(plain[1]["kl"], rel=1e-2) and plain[1]["kl"] > 0


# Launchers


def launch(tmp_path, *command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.join(ROOT, "tests") + os.pathsep + ROOT}
    command = [sys.executable, "-m", *command]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def test_accelerate_launches_the_script(tmp_path):
    """As a user starts it, from another directory."""
    launcher = ["accelerate.commands.launch", "--num_processes", "1", os.path.join(ROOT, "train_rlr_sd.py")]
    result = launch(tmp_path, *launcher, *BASE, "--output_dir", "out", "--max_train_steps", "1")
    assert "2 = 2 batch x 1 accumulation x 1 ranks" in result.stdout
    assert "reward=" in result.stderr and "seconds=" in result.stderr
    # Besides progress bars, what the launcher itself says, and what torchao has not been built for, nothing of other libraries.
    printed = re.split(r"[\r\n]+", result.stderr.partition("run `accelerate config`.")[2])
    assert [line for line in printed if line and not re.search(r"\d+%\||torchao|_pytree", line)] == []
    assert [line["step"] for line in metrics_of(tmp_path / "out")] == [1]


TWO_RANKS = """
import os, pathlib, sys

from rlr_testing import train

out, *flags = sys.argv[1:]
train(pathlib.Path(out), *flags)
# The ranks meet again elsewhere, where nothing is left of the first run.
os.environ.update(MASTER_PORT=str(int(os.environ["MASTER_PORT"]) + 1), TORCHELASTIC_USE_AGENT_STORE="False")
train(pathlib.Path(out), *flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
"""


def test_two_ranks_train_and_resume_one_adapter(tmp_path):
    """The ranks draw other noise, end in the same adapter, and write one line per step.

    Before it is saved, a checkpoint compares the adapters, which would differ without the average of the gradients.
    """
    (tmp_path / "session.py").write_text(TWO_RANKS)
    (tmp_path / "prompts.txt").write_text("a red one\na blue two\n" + "a green three and " * 10 + "a blue nine\n")
    flags = ["--num_inference_steps", "5", "--checkpointing_steps", "2", "--learning_rate", "1e-2"]
    flags += ["--prompts", str(tmp_path / "prompts.txt")]
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "session.py")]
    result = launch(tmp_path, *launcher, str(tmp_path / "out"), *flags)
    assert "4 = 2 batch x 1 accumulation x 2 ranks" in result.stdout
    # Each of the two runs warns once, whatever the number of ranks.
    assert result.stderr.count("does not see") == 2
    lines = metrics_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["num_images"] == 4 for line in lines)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    states = [name for name in os.listdir(checkpoint) if name.startswith("random_states")]
    assert len({(checkpoint / state).read_bytes() for state in states}) == 2
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["num_processes"] == 2
