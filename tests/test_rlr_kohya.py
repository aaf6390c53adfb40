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
"""The adapter in the layout of kohya: other programs find each layer and its alpha, and it is read back as it was trained."""

import pytest
import torch
from diffusion_models import load_model
from diffusion_models.adapters import KOHYA_FILE, add_lora, load_adapter, load_lora, save_kohya
from rlr_loras import LAYERS, assert_updates, expected_updates, in_kohya, matrices_of, save
from rlr_models import FOLDERS, plain_pipeline, tiny_sdxl
from rlr_testing import LORA, TINY_SD, tiny_pipeline, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(params=FOLDERS, scope="module")
def folder(request):
    return FOLDERS[request.param]()


def model_with(folder, layers, path):
    """A model with a LoRA of layers {name: (rank, alpha)}, and what it adds to the weights."""
    model = load_model(folder)
    matrices = matrices_of(model.network, layers)
    load_lora(model, save(in_kohya(matrices), path))
    return model, expected_updates(matrices)


# Layers of the same scale have different alphas where their ranks differ, and diffusers reads one alpha only.
SAME_SCALE = {name: (rank, 3.0 * rank) for name, (rank, _) in LAYERS.items()}


@pytest.mark.parametrize("layers", [LAYERS, SAME_SCALE], ids=["scales", "ranks"])
def test_a_plain_pipeline_and_both_scripts_read_what_was_trained(tmp_path, folder, layers):
    model, expected = model_with(folder, layers, tmp_path / "first.safetensors")
    save_kohya(model, tmp_path)
    plain, evaluated, trained = plain_pipeline(folder), plain_pipeline(folder), load_model(folder)
    plain.load_lora_weights(tmp_path / KOHYA_FILE)
    load_adapter(evaluated, str(tmp_path / KOHYA_FILE), "one")
    load_lora(trained, str(tmp_path / KOHYA_FILE))
    for network in (plain.unet, evaluated.unet, trained.network):
        assert_updates(network, expected)


def test_the_images_of_a_plain_pipeline_are_those_of_the_adapter_of_a_run(tmp_path):
    train(tmp_path, "--export_kohya", "--rank", "3", "--lora_alpha", "5", "--learning_rate", "3e-2")
    images = []
    for name in (None, LORA, KOHYA_FILE):
        pipeline = tiny_pipeline()
        if name is not None:
            pipeline.load_lora_weights(tmp_path, weight_name=name)
        options = {"num_inference_steps": 3, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
        images.append(pipeline("a red one", **options).images)
    base, own, exported = images
    assert (own - base).abs().max() > 0.05
    torch.testing.assert_close(exported, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("folder", "keys", "metadata"),
    [
        (
            TINY_SD,
            [
                "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_up_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0",
            ],
            {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
        ),
        (
            tiny_sdxl,
            [
                "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_out_0",
                "lora_unet_middle_block_1_transformer_blocks_1_attn1_to_out_0",
                "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_out_0",
            ],
            {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
        ),
    ],
    ids=["SD", "SDXL"],
)
def test_the_names_and_metadata_are_those_that_other_programs_look_for(tmp_path, folder, keys, metadata):
    """ComfyUI knows both names of a layer; AUTOMATIC1111 wants the original ones for SDXL, and sorts by the metadata."""
    model = load_model(folder if isinstance(folder, str) else folder())
    add_lora(model, rank=4, alpha=2, layers=["to_out.0"])
    save_kohya(model, tmp_path)
    tensors = load_file(tmp_path / KOHYA_FILE)
    names = {key.partition(".")[0] for key in tensors}
    assert names >= set(keys) and all(name.startswith("lora_unet_") for name in names)
    assert tensors.keys() == {
        f"{name}.{part}" for name in names for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert all(tensors[f"{name}.alpha"] == 2 and len(tensors[f"{name}.lora_down.weight"]) == 4 for name in names)
    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


def test_stable_diffusion_2_is_named_in_the_metadata(tmp_path):
    """By the width of its prompts."""
    model = load_model(TINY_SD)
    add_lora(model, rank=1, alpha=1, layers=["to_q"])
    model.network.register_to_config(cross_attention_dim=1024)
    save_kohya(model, tmp_path)
    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "ss_base_model_version": "sd_v2", "ss_v2": "True"}


def test_the_file_may_be_rounded_to_float16(tmp_path):
    """As some programs do: a small scale is in the alpha, and the matrices do not vanish."""
    layers = {name: (rank, 2.0**-12 * rank) for name, (rank, _) in LAYERS.items()}
    model, expected = model_with(TINY_SD, layers, tmp_path / "first.safetensors")
    save_kohya(model, tmp_path)
    rounded = {key: value.half() for key, value in load_file(tmp_path / KOHYA_FILE).items()}
    save_file(rounded, tmp_path / "half.safetensors")
    read = load_model(TINY_SD)
    load_lora(read, str(tmp_path / "half.safetensors"))
    for name, weight in expected.items():
        found = read.network.get_submodule(name).get_delta_weight("default").double()
        assert (found - weight).norm() < 1e-3 * weight.norm()


def test_a_run_that_is_overwritten_leaves_no_such_file(tmp_path):
    out = tmp_path / "out"
    train(out, "--export_kohya", "--max_train_steps", "1")
    assert (out / KOHYA_FILE).is_file() and not list(out.glob("partial*"))
    train(out, "--overwrite_output_dir", "--max_train_steps", "1")
    assert (out / LORA).is_file() and not (out / KOHYA_FILE).exists()
