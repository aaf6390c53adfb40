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
"""Which steps of a chain a run sweeps and predicts, and that kept graphs only save calls."""

import re

import pytest
import torch
from rlr_testing import same_adapter, train
from rlr_utils import DenoisingChain, Schedule


@pytest.mark.parametrize(
    "also",
    [
        ["--kl_weight", "0.1", "--gradient_accumulation_steps", "2"],
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2", "--baseline", "predicted_x0"],
        ["--gradient_estimator", "rlr_paper", "--rest", "likelihood_ratio", "--gradient_checkpointing"],
        ["--gradient_estimator", "truncated_bp"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_kept_graphs_change_nothing_but_the_calls(tmp_path, also, capsys, monkeypatch):
    calls = []

    def counted(self, k, x, prediction=DenoisingChain._prediction):
        calls.append(k)
        return prediction(self, k, x)

    monkeypatch.setattr(DenoisingChain, "_prediction", counted)
    train(tmp_path / "again", *also, "--learning_rate", "1e-3")
    again, planned = len(calls), capsys.readouterr().out
    calls.clear()
    train(tmp_path / "kept", *also, "--learning_rate", "1e-3", "--keep_graphs", "2")
    assert same_adapter(tmp_path / "again", tmp_path / "kept")
    # Two steps of a batch, or as many as the estimator sweeps.
    batches = 4 if "--gradient_accumulation_steps" in also else 2
    kept = 1 if "truncated_bp" in also else 2
    assert again - len(calls) == batches * kept
    forwards = [int(re.search(r"(\d+) forward", text).group(1)) for text in (planned, capsys.readouterr().out)]
    assert forwards[0] - forwards[1] == 2 * 2 * kept * batches / 2


def test_the_sweep_computes_the_steps_that_were_drawn(tmp_path, monkeypatch):
    """Counts calls of the network with and without a graph, in three optimizer steps with some graphs kept."""
    drawn, calls, plain, plain_draw = [], {True: 0, False: 0}, DenoisingChain.mean, Schedule.draw

    def counting(chain, k, x):
        calls[torch.is_grad_enabled()] += 1
        return plain(chain, k, x)

    def drawing(schedule, rng):
        result = plain_draw(schedule, rng)
        drawn.append(result.weights[1:])
        return result

    monkeypatch.setattr(DenoisingChain, "mean", counting)
    monkeypatch.setattr(Schedule, "draw", drawing)
    flags = ["--num_inference_steps", "6", "--train_batch_size", "4", "--max_train_steps", "3"]
    metrics = train(tmp_path, *flags, "--keep_graphs", "4")
    kept, swept = (sum(w > 0 for weights in drawn for w in weights[:end]) for end in (4, 6))
    assert len(drawn) == 3 and 9 <= kept < swept < 18
    assert calls == {True: swept + 1, False: 18 - kept}  # one more at the start tries the model
    assert metrics[0]["swept_steps"] == 4.5


def test_steps_that_are_left_out_of_the_sweep_only_add_noise(tmp_path):
    """With all graphs kept it is the same step."""
    flags = ["--num_inference_steps", "6", "--train_batch_size", "4", "--max_train_steps", "1"]
    kept = train(tmp_path / "kept", *flags, "--keep_graphs", "6")
    again = train(tmp_path / "again", *flags)
    whole = train(tmp_path / "whole", *flags, "--sweep_fraction", "1")
    assert kept[0]["grad_norm"] == again[0]["grad_norm"] and same_adapter(tmp_path / "kept", tmp_path / "again")
    assert kept[0]["grad_norm"] != pytest.approx(whole[0]["grad_norm"], rel=1e-3)
    assert kept[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=0.5)


def test_a_divergence_counts_by_the_weight_of_its_step(tmp_path, monkeypatch):
    train(tmp_path / "first", "--learning_rate", "1e-2")
    flags = ["--adapter_path", str(tmp_path / "first"), "--kl_weight", "0.1", "--max_train_steps", "1"]
    kl = {}
    for weight in (0.0, 1.0, 2.0):
        monkeypatch.setattr(
            Schedule, "draw", lambda schedule, rng, w=weight: schedule._replace(weights=[*[1.0] * 6, w])
        )
        metrics = train(tmp_path / str(weight), *flags, "--num_inference_steps", "6")
        kl[weight] = metrics[0]["kl"]
    assert 0 < kl[0.0] < kl[1.0]
    assert (kl[0.0] + kl[2.0]) / 2 == pytest.approx(kl[1.0], rel=1e-5)


# The baseline


@pytest.mark.parametrize(
    ("flags", "same_as", "predicted"),
    [
        ([], "leave_one_out", [0, 0]),
        (["--reward", "jpeg_compressibility"], "predicted_x0", [4, 4]),
        (["--reward", "aesthetic,jpeg_compressibility"], "predicted_x0", [4, 4]),
        (["--reward", "jpeg_compressibility", "--gradient_estimator", "ddpo"], "leave_one_out", [0, 0]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else "",
)
def test_the_default_baseline_predicts_where_a_part_has_no_gradient(tmp_path, flags, same_as, predicted):
    flags = [*flags, "--num_inference_steps", "4", "--learning_rate", "1e-3"]
    metrics = train(tmp_path / "auto", *flags)
    train(tmp_path / "named", *flags, "--baseline", same_as)
    assert [line["predicted_steps"] for line in metrics] == predicted
    assert same_adapter(tmp_path / "auto", tmp_path / "named")


def test_the_default_baseline_predicts_where_a_gradient_is_rough(tmp_path):
    """The mixing knows of it after the first step. The last half of the chain is predicted, except the very last step, at
    which only the gradient is used."""
    module = tmp_path / "rough.py"
    module.write_text("def rough(images, prompts):\n    return (1e5 * images.mean((1, 2, 3))).sin()\n")
    flags = ["--reward", f"{module}:rough", "--max_train_steps", "3", "--num_inference_steps", "6"]
    metrics = train(tmp_path / "out", *flags, "--train_batch_size", "4")
    first, *later = [(line["gamma_mean"], line["predicted_steps"]) for line in metrics]
    assert first[0] > 0.99 and first[1] == 0
    assert all(gamma < 0.5 and steps == 2 for gamma, steps in later)
