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
"""train_rlr_flow.py and evaluate_rlr.py on tiny pipelines of every flow-matching family."""

import json
import re
import shlex
import shutil

import evaluate_rlr
import pytest
import torch
import train_rlr_flow
from diffusion_models import load_model
from huggingface_hub import ModelCard
from rlr_flow_models import FLOW_FOLDERS, plain_flow_pipeline, tiny_flux, tiny_flux2_klein, tiny_qwen_image, tiny_sd3
from rlr_models import RED, SEEN, seeded, training_generators
from rlr_processes import run_two_ranks
from rlr_testing import ASSETS, LORA, TINY_CLIP, TINY_SD, forget_accelerator, metrics_of, same_adapter, train
from rlr_training.evaluation import EVALUATION_SEED
from safetensors import safe_open

from diffusers import AutoencoderTiny


PROMPTS = ["a red seven", "a blue two on a green field"]
BASE = [
    *("--reward", RED, "--decode_batch_size", "2", "--height", "32", "--width", "48", "--num_inference_steps", "3"),
    *("--train_batch_size", "2", "--max_train_steps", "2", "--seed", "0", "--num_eval_images", "0"),
    *("--report_to", "none", "--learning_rate", "1e-2"),
]
LEVELS = {"prompt": "a seven", "coarse": "a digit", "mid": "a red digit", "fine": "a thin red seven"}


def train_flow(folder, output_dir, *flags):
    """The metrics of a run on a model of `rlr_flow_models`."""
    forget_accelerator()
    where = ["--pretrained_model_name_or_path", folder, "--output_dir", str(output_dir)]
    train_rlr_flow.main(train_rlr_flow.parse_args([*BASE, *where, *flags]))
    return metrics_of(output_dir)


def test_a_flag_of_another_script_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        train_rlr_flow.parse_args(["--export_kohya"])
    assert "--export_kohya: only train_rlr_sd.py writes this layout" in capsys.readouterr().err


@pytest.fixture
def prompts(tmp_path):
    """The flag of a file of prompts that differ in length."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["--prompts", str(tmp_path / "prompts.txt")]


@pytest.mark.parametrize("name", FLOW_FOLDERS)
def test_a_run_ends_in_an_adapter_for_the_plain_pipeline(tmp_path, prompts, name, monkeypatch):
    folder, out = FLOW_FOLDERS[name](), tmp_path / "out"
    flags = [*prompts, "--num_eval_images", "2", "--ema_decay", "0.5", "--checkpointing_steps", "1"]
    flags += [
        "--heldout_reward",
        RED,
        "--heldout_steps",
        "1",
        "--num_heldout_images",
        "4",
        "--feature_model",
        TINY_CLIP,
    ]
    flags += ["--validation_prompts", "a thin one", "--num_validation_images", "1"]
    metrics = train_flow(folder, out, *flags)
    assert [line["step"] for line in metrics] == [1, 2] and metrics[1]["heldout_mean"] != metrics[0]["heldout_mean"]
    assert {path.name for path in out.iterdir()} >= {
        LORA,
        "ema",
        "best",
        "validation",
        "README.md",
        "before_after.png",
    }
    with safe_open(out / LORA, "pt") as file:
        assert all(key.startswith("transformer.") and ".lora_" in key for key in file.keys())
    # The tuned images of the comparison are those of a plain pipeline with the adapter.
    images, drawn_for = SEEN[-1]
    model, pipeline = load_model(folder), plain_flow_pipeline(folder)
    pipeline.load_lora_weights(out, weight_name=LORA)
    arguments = model.pipeline_arguments((32, 48), 3, model.guidance_scale)
    fixed = seeded([EVALUATION_SEED, EVALUATION_SEED + 1])
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * 2
    expected = pipeline(prompt=list(drawn_for), generator=fixed, output_type="pt", **arguments).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    # The card's example runs, beside the folder of the model and that of the adapter.
    (tmp_path / folder.split("/")[-1]).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(re.search(r"```py\n(.*?)```", ModelCard.load(out / "README.md").text, re.DOTALL)[1], scope)
    assert scope["image"].size == (48, 32)
    # A resumed run is the run that was not interrupted.
    shutil.copytree(out, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-2")
    resumed = train_flow(folder, tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert same_adapter(out, tmp_path / "resumed") and resumed[-1]["reward_mean"] == metrics[-1]["reward_mean"]


def test_training_adds_noise_to_the_steps_of_the_pipeline(tmp_path, prompts):
    """The rollout's images differ from the pipeline's, which draws without noise, unless the noise is switched off."""
    images = {}
    for eta in ("0", "1"):
        SEEN.clear()
        flags = ["--max_train_steps", "1", "--eta", eta, "--gradient_estimator", "full_bp"]
        train_flow(tiny_sd3(), tmp_path / eta, *prompts, *flags)
        images[eta], drawn_for = SEEN[-1]
    pipeline, generators = plain_flow_pipeline(tiny_sd3()), training_generators(1)
    size = {"height": 32, "width": 48, "num_inference_steps": 3}
    expected = pipeline(list(drawn_for), generator=generators, output_type="pt", **size).images
    torch.testing.assert_close(images["0"], expected, rtol=0, atol=2e-5)
    assert (images["1"] - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_estimator", "ddpo", "--num_inner_epochs", "2"],
        ["--gradient_estimator", "draft_lv"],
        ["--gradient_estimator", "truncated_bp", "--truncation_steps", "2", "--sigmas", "linspace"],
        ["--gradient_estimator", "rlr_paper", "--rest", "likelihood_ratio"],
        ["--reward", "jpeg_compressibility", "--branches", "1"],
        ["--reward", f"{RED},jpeg_compressibility:0.1", "--noise", "flow_sde"],
        ["--kl_weight", "0.01", "--gradient_checkpointing"],
        ["--mixed_precision", "bf16", "--keep_graphs", "1", "--max_sequence_length", "40"],
    ],
    ids=lambda flags: " ".join(flags),
)
def test_every_way_to_train(tmp_path, prompts, flags):
    metrics = train_flow(tiny_sd3(with_t5=False), tmp_path / "out", *prompts, *flags)
    assert all(line["grad_norm"] > 0 for line in metrics)


def test_an_adapter_is_trained_further(tmp_path, prompts):
    folder = tiny_flux()
    train_flow(folder, tmp_path / "first", *prompts)
    train_flow(folder, tmp_path / "second", *prompts, "--adapter_path", str(tmp_path / "first"), "--seed", "1")
    with safe_open(tmp_path / "first" / LORA, "pt") as first, safe_open(tmp_path / "second" / LORA, "pt") as second:
        assert first.keys() == second.keys()
        changes = [(second.get_tensor(key) - first.get_tensor(key)).abs().max() for key in first.keys()]
    # AdamW moves a number by about the learning rate in each of the two steps.
    assert 0 < max(changes) < 0.05


def test_a_chain_of_thought_changes_the_prompt_between_steps(tmp_path):
    """With prompts of differing length, which Qwen-Image masks."""
    (tmp_path / "levels.jsonl").write_text(json.dumps(LEVELS))
    flags = ["--prompts", str(tmp_path / "levels.jsonl"), "--num_eval_images", "2", "--max_train_steps", "1"]
    flags += ["--dcot_boundaries", "0.3", "0.6"]
    for folder in (tiny_qwen_image(), tiny_sd3()):
        train_flow(folder, tmp_path / "out", *flags, "--overwrite_output_dir")
        base = SEEN[-2][0]
        model = load_model(folder)
        chain = model.make_chain(model.network, 3, (32, 48), guidance_scale=model.guidance_scale, eta=0.0)
        conditions = [model.embed([LEVELS[level]] * 2) for level in ("coarse", "mid", "fine")]
        chain = chain.conditioned_on(conditions, model.embed_negative())
        x = model.draw_latents(chain, 2, (32, 48), seeded([EVALUATION_SEED, EVALUATION_SEED + 1]))
        with torch.no_grad():
            for k in (3, 2, 1):
                x = chain.mean(k, x)
            torch.testing.assert_close(base, model.decode(x), rtol=0, atol=2e-5)


def test_a_prompt_that_t5_does_not_read_to_its_end_is_named_once(tmp_path, caplog, capsys):
    """Also by diffusers, which warns of every prompt that is too long for CLIP."""
    (tmp_path / "long.txt").write_text(f"a {'very ' * 100}old cat\na dog")
    train_flow(tiny_sd3(), tmp_path / "out", "--prompts", str(tmp_path / "long.txt"), "--max_train_steps", "1")
    (line,) = [record.getMessage() for record in caplog.records if "longer than" in record.getMessage()]
    assert line.startswith(
        "1 of 2 prompts are longer than 256 tokens, which is all that the text encoder reads: of 'a very"
    )
    assert "truncated" not in caplog.text + capsys.readouterr().err


def test_two_ranks_take_the_steps_of_one(tmp_path, prompts):
    where = ["--pretrained_model_name_or_path", tiny_sd3(), *prompts, "--height", "32", "--width", "32"]
    flags = [*BASE, *where, "--gradient_estimator", "full_bp"]
    run_two_ranks(tmp_path / "two", *flags, "--train_batch_size", "1", script="train_rlr_flow")
    train_flow(tiny_sd3(), tmp_path / "one", *flags)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")):
        assert one["reward_mean"] == pytest.approx(two["reward_mean"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_the_evaluation_draws_what_the_pipeline_draws(tmp_path, prompts):
    folder = tiny_flux2_klein()
    train_flow(folder, tmp_path / "lora", *prompts)
    SEEN.clear()
    flags = ["--pretrained_model_name_or_path", folder, "--adapters", str(tmp_path / "lora"), "--reward", RED]
    flags += [*prompts, "--feature_model", TINY_CLIP, "--images_per_prompt", "2", "--num_prompts", "1"]
    flags += ["--resolution", "32", "--num_inference_steps", "3", "--output_dir", str(tmp_path / "evaluation")]
    results = evaluate_rlr.main(evaluate_rlr.parse_args(flags))
    assert set(results["models"]) == {"base", "lora"} and results["models"]["lora"]["drift"] > 0
    drawn = torch.cat([images for images, _ in SEEN[-4:]])
    pipeline = plain_flow_pipeline(folder)
    arguments = load_model(folder).pipeline_arguments((32, 32), 3, 4.0)
    expected = []
    for _ in range(2):
        fixed = seeded([EVALUATION_SEED, EVALUATION_SEED + 1])
        expected.append(pipeline(prompt=[PROMPTS[0]] * 2, generator=fixed, output_type="pt", **arguments).images)
        pipeline.load_lora_weights(tmp_path / "lora", weight_name=LORA)
    torch.testing.assert_close(drawn, torch.cat(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("reward", ["aesthetic", "jpeg_compressibility"])
def test_a_trained_model_learns(tmp_path, reward):
    """The embedded Stable Diffusion 3, in ten steps, on a smooth reward and on a black box: by three standard errors."""
    flags = [
        "--prompts",
        f"{ASSETS}/emoji.txt",
        "--reward",
        reward,
        "--reward_path",
        f"aesthetic={ASSETS}/tiny-emoji-rewards",
    ]
    flags += [
        "--max_train_steps",
        "10",
        "--learning_rate",
        "5e-3",
        "--num_inference_steps",
        "5",
        "--guidance_scale",
        "4.5",
    ]
    flags += ["--train_batch_size", "16", "--decode_batch_size", "16", "--max_sequence_length", "1", "--width", "48"]
    flags += ["--height", "48", "--num_eval_images", "32"]
    train_flow(f"{ASSETS}/tiny-emoji-sd3", tmp_path, *flags)
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert results["gain"]["mean"] > 3 * results["gain"]["standard_error"] > 0


# What is refused


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
        (lambda: TINY_SD, [], "a StableDiffusionPipeline is not supported here, but by another script"),
        (tiny_flux, ["--negative_prompt", "a dog"], "FLUX.1 has no classifier-free guidance"),
        (tiny_sd3, ["--height", "33"], "not multiples of"),
        (tiny_sd3, ["--eta", "0", "--gradient_estimator", "ddpo"], "--eta 0 leaves no noise"),
        (tiny_sd3, ["--noise", "flow_sde", "--final_noise", "0.1"], "--final_noise 0.1 is for --noise ddim"),
        (tiny_sd3, ["--final_noise", "2"], "--final_noise 2.0 is neither auto nor a number in"),
        (tiny_sd3, ["--gradient_estimator", "ddpo", "--final_noise", "0"], "adds no noise at step 1 from the end"),
        (tiny_sd3, ["--truncation_steps", "4", "--gradient_estimator", "truncated_bp"], "--truncation_steps 4"),
        (tiny_qwen_image, ["--num_inference_steps", "1"], "no levels for 1 steps"),
        (
            tiny_qwen_image,
            ["--baseline_vae", "TINY_VAE", "--reward", "jpeg_compressibility"],
            "the VAE of Qwen-Image can be replaced by no other",
        ),
        (tiny_sd3, ["--lora_layers", "attn.to_x"], "the transformer has no layer 'attn.to_x'"),
        (
            tiny_sd3,
            ["--max_sequence_length", "513"],
            "--max_sequence_length 513: a StableDiffusion3Pipeline reads at most",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, capsys, prompts, folder, flags, message):
    if "TINY_VAE" in flags:
        blocks = {f"{name}_block_out_channels": (8, 8) for name in ("encoder", "decoder")}
        counts = {f"num_{name}_blocks": (1, 1) for name in ("encoder", "decoder")}
        AutoencoderTiny(**blocks, **counts).save_pretrained(tmp_path / "vae")
        flags = [str(tmp_path / "vae") if flag == "TINY_VAE" else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        train_flow(folder(), tmp_path / "out", *prompts, *flags)
    printed = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert message in printed and printed.startswith("train_rlr_flow.py: error: ") and printed.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--sigmas", "linspace"], ["--max_sequence_length", "9"]], ids=" ".join)
def test_flags_of_flow_models_are_refused_for_others(tmp_path, flags):
    command = ["--pretrained_model_name_or_path", TINY_SD, "--adapters", "none", "--feature_model", TINY_CLIP, *flags]
    command += ["--prompts", "simple_animals", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"{' '.join(flags)} is for other models, not for a StableDiffusionPipe"):
        evaluate_rlr.main(evaluate_rlr.parse_args(command))


def test_an_evaluation_of_a_flow_model_takes_no_noise(tmp_path):
    command = ["--pretrained_model_name_or_path", tiny_sd3(), "--adapters", "none", "--feature_model", TINY_CLIP]
    with pytest.raises(SystemExit, match="--eta 0.5 is not for a StableDiffusion3Pipeline, which draws without noise"):
        evaluate_rlr.main(evaluate_rlr.parse_args([*command, "--eta", "0.5", "--output_dir", str(tmp_path / "out")]))


def test_the_plan_counts_the_calls_of_a_network_that_is_told_the_guidance_once(tmp_path, prompts, capsys):
    flags = ["--gradient_estimator", "full_bp", "--max_train_steps", "1", "--eta", "0.5", "--sigmas", "linspace"]
    train_flow(tiny_flux(), tmp_path / "out", *prompts, *flags)
    printed = capsys.readouterr().out
    assert re.search(r"network calls per step +6 forward \+ 6 with backward", printed)
    # The command that evaluates the adapter names the model, and leaves out the noise, which an evaluation has not.
    words = shlex.split(re.search("to evaluate it: python evaluate_rlr.py (.*)", printed)[1])
    args = evaluate_rlr.parse_args(words)
    assert (args.pretrained_model_name_or_path, args.sigmas, args.eta) == (tiny_flux(), "linspace", 1.0)


def test_a_flow_model_is_refused_by_the_script_of_unets(tmp_path):
    with pytest.raises(
        SystemExit, match="a FluxPipeline is not supported here, but by another script, only StableDiffusion"
    ):
        train(tmp_path / "out", "--pretrained_model_name_or_path", tiny_flux())
