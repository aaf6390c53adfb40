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
"""Short runs of every estimator and family in every precision, on a GPU; `make gpu` runs them, other tests leave it alone."""

import math
import os

import pytest
import torch
import train_rlr_flow
import train_rlr_video
from rlr_flow_models import FLOW_FOLDERS
from rlr_models import FOLDERS, RED
from rlr_testing import BASE, LORA, forget_accelerator, metrics_of, train
from rlr_utils import ESTIMATORS
from rlr_video_models import tiny_wan
from rlr_video_models_other import tiny_animatediff, tiny_cogvideox, tiny_ltx
from safetensors.torch import load_file


pytestmark = pytest.mark.skipif(
    os.environ.get("RUN_GPU") != "1" or not torch.cuda.is_available(), reason="needs RUN_GPU=1 and a GPU"
)
PRECISIONS = {
    "float32": ["--mixed_precision", "no"],
    "tf32": ["--mixed_precision", "no", "--allow_tf32"],
    "bf16": ["--mixed_precision", "bf16"],
    "fp16": ["--mixed_precision", "fp16"],
}
VIDEO_FAMILIES = {
    "WanPipeline": (tiny_wan, "9"),
    "LTXPipeline": (tiny_ltx, "9"),
    "CogVideoXPipeline": (tiny_cogvideox, "9"),
    "AnimateDiffPipeline": (tiny_animatediff, "4"),
}
FLOW_BASE = [*BASE, "--reward", RED, "--height", "32", "--width", "32", "--decode_batch_size", "2"]


def check_run(output_dir, metrics):
    """The run has taken its steps, with finite numbers, and its adapter has learnt something."""
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(math.isfinite(value) for line in metrics for value in line.values() if isinstance(value, float))
    weights = load_file(output_dir / LORA)
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name or "lora.up" in name)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_trains_in_every_precision(tmp_path, estimator, precision):
    flags = ["--gradient_estimator", estimator, *PRECISIONS[precision]]
    check_run(tmp_path / "out", train(tmp_path / "out", *flags))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cuda_graphs_take_the_same_steps(tmp_path, caplog, precision):
    flags = ["--max_train_steps", "3", "--learning_rate", "1e-2", *PRECISIONS[precision]]
    plain = train(tmp_path / "plain", *flags)
    graphed = train(tmp_path / "graphed", *flags, "--cuda_graphs")
    assert "CUDA graphs" not in caplog.text  # no warning
    tolerance = {"float32": 1e-3, "tf32": 2e-2}.get(precision, 5e-2)
    for one, other in zip(plain, graphed):
        assert one["reward_mean"] == pytest.approx(other["reward_mean"], rel=tolerance)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=3 * tolerance)


@pytest.mark.parametrize("flags", [["--offload_blocks"], ["--vae_offload", "--reward_offload"]], ids=" ".join)
def test_what_rests_on_the_cpu_changes_no_number(tmp_path, flags):
    lines = [train(tmp_path / name, *own) for name, own in (("plain", []), ("offloaded", flags))]
    for one, other in zip(*lines, strict=True):
        assert one["reward_mean"] == pytest.approx(other["reward_mean"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("graphs", [[], ["--cuda_graphs"]], ids=" ".join)
def test_quantized_networks_train(tmp_path, kind, graphs):
    lines = train_flow(tmp_path / "out", "FluxPipeline", "--mixed_precision", "bf16", "--quantize", kind, *graphs)
    check_run(tmp_path / "out", lines)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_unet_family_trains_in_every_precision(tmp_path, name, precision):
    flags = ["--pretrained_model_name_or_path", str(FOLDERS[name]()), "--reward", RED, *PRECISIONS[precision]]
    check_run(tmp_path / "out", train(tmp_path / "out", *flags))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FLOW_FOLDERS)
def test_every_flow_family_trains_in_every_precision(tmp_path, name, precision):
    check_run(tmp_path / "out", train_flow(tmp_path / "out", name, *PRECISIONS[precision]))


def train_flow(output_dir, name, *flags):
    """Train a tiny flow model; returns the metrics."""
    forget_accelerator()
    where = ["--pretrained_model_name_or_path", FLOW_FOLDERS[name](), "--output_dir", str(output_dir)]
    train_rlr_flow.main(train_rlr_flow.parse_args([*FLOW_BASE, *where, *flags]))
    return metrics_of(output_dir)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_every_video_family_trains_in_every_precision(tmp_path, name, precision):
    forget_accelerator()
    make_folder, frames = VIDEO_FAMILIES[name]
    where = ["--pretrained_model_name_or_path", make_folder(), "--output_dir", str(tmp_path / "out")]
    flags = [*FLOW_BASE, *where, "--num_frames", frames, *PRECISIONS[precision]]
    train_rlr_video.main(train_rlr_video.parse_args(flags))
    check_run(tmp_path / "out", metrics_of(tmp_path / "out"))
