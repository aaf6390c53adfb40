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
"""Flow-matching pipelines that are damaged, incomplete or of another kind: refused in one line, never loaded as another."""

import json
import os
import re
import shutil
from inspect import Parameter, signature
from types import SimpleNamespace

import pytest
import torch
import transformers
from diffusion_models import as_model, load_model
from diffusion_models.loading import _load_part
from rlr_flow_models import FLOW_FOLDERS, plain_flow_pipeline, tiny_sd3
from rlr_models import cache_repository, edit_json, seeded
from rlr_training.hub import _example
from rlr_utils import rollout
from safetensors.torch import load_file, save_file

import diffusers
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler


SD3, FLUX, KLEIN, QWEN, Z_IMAGE = FLOW_FOLDERS
PROMPTS, SIZE, NONE = ["a red seven", "a blue two on a green field"], (32, 48), [None, None]
# [(class of the pipeline, component)], without those that it has by default.
PARTS = [
    (pipeline, name)
    for pipeline in FLOW_FOLDERS
    for name, parameter in signature(getattr(diffusers, pipeline)).parameters.items()
    if parameter.default is Parameter.empty
]


@pytest.fixture
def copy_of(tmp_path):
    """`copy_of(pipeline)` is a copy of its tiny folder. The weights are links: they must be replaced, not written into."""

    def put(source, target):
        return os.symlink(source, target) if source.endswith(".safetensors") else shutil.copy(source, target)

    return lambda pipeline: shutil.copytree(FLOW_FOLDERS[pipeline](), tmp_path / "model", copy_function=put)


def path_of(folder, name):
    """The path of a component's configuration, or of model_index.json for ""."""
    return folder / name / {"": "model_index.json", "scheduler": "scheduler_config.json"}.get(name, "config.json")


def assert_refused(folder, message):
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: {message}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def images_of(model):
    """What the chain draws without noise, from a generator for each image."""
    chain = model.make_chain(model.network, 3, SIZE, guidance_scale=model.guidance_scale, eta=0.0)
    chain = chain.conditioned_on(model.embed(PROMPTS), model.embed_negative())
    with torch.no_grad():
        x_T = model.draw_latents(chain, len(PROMPTS), SIZE, seeded(range(len(PROMPTS))))
        return model.decode(rollout(chain, x_T).latents[0])


@pytest.mark.parametrize(("pipeline", "name"), PARTS)
def test_a_component_that_is_missing_is_refused_by_name(copy_of, pipeline, name):
    folder, message = copy_of(pipeline), "its vocabulary is missing, one of the files .*tokenizer.json"
    if name == "tokenizer" and pipeline in (KLEIN, Z_IMAGE):
        (folder / name / "chat_template.jinja").unlink()
        assert_refused(folder, "the tokenizer has no chat template, into which the pipeline writes prompts")
    if name.startswith("tokenizer"):
        (folder / name / "tokenizer.json").unlink()
        assert_refused(folder, f"{name}: {message}")
    shutil.rmtree(folder / name)
    assert_refused(folder, f"{name}: ({message}|.*No such file or directory)")


@pytest.mark.parametrize(("pipeline", "name"), [part for part in PARTS if re.match("text|transformer|vae", part[1])])
def test_weights_that_lack_a_tensor_or_have_one_without_a_place_are_refused(copy_of, pipeline, name):
    """Statistics of a VAE's batch norm are weights too. Text encoders may come from a larger model."""
    folder = copy_of(pipeline)
    (path,) = (folder / name).glob("*.safetensors")
    tensors, lost = load_file(path), "bn.running_var" if (pipeline, name) == (KLEIN, "vae") else ""
    os.remove(path)
    save_file({key: tensors[key] for key in tensors if key != (lost or min(tensors))}, path, {"format": "pt"})
    assert_refused(folder, f"{name}: its weights lack [12] tensors of .*, such as '{lost}")
    if "text_encoder" not in name:
        save_file({**tensors, "more.weight": torch.ones(2)}, path, {"format": "pt"})
        assert_refused(folder, f"{name}: its config.json has no place for 1 tensors, such as 'more.weight'")


def test_other_ways_to_save_a_model_are_the_same_model(copy_of):
    """Weights in several files, and a tokenizer that model_index.json says to be of the class of all tokenizers."""
    folder, whole = copy_of(QWEN), load_model(FLOW_FOLDERS[QWEN]())
    edit_json(path_of(folder, ""), {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    shutil.rmtree(folder / "transformer")
    whole.network.save_pretrained(folder / "transformer", max_shard_size="80KB")
    assert torch.equal(images_of(load_model(str(folder))), images_of(whole))
    os.remove(sorted((folder / "transformer").glob("*.safetensors"))[1])
    assert_refused(folder, "transformer: .")


# Configurations

# The text encoders that are left out are of the same classes. What must be there, even if a tiny model has the library's
# default, is named where the weights' shapes do not show it.
HEADS = "num_attention_heads attention_head_dim"
NEEDED = {
    **{part: "" for part in PARTS if part[1] in ("scheduler", "transformer", "vae")},
    (FLUX, "scheduler"): "shift use_dynamic_shifting base_shift max_shift base_image_seq_len max_image_seq_len",
    (KLEIN, "scheduler"): "shift use_dynamic_shifting",
    (QWEN, "scheduler"): "use_dynamic_shifting shift_terminal base_shift max_shift max_image_seq_len",
    (SD3, "transformer"): f"{HEADS} sample_size",
    **{(pipeline, "transformer"): f"{HEADS} axes_dims_rope" for pipeline in (FLUX, KLEIN, QWEN)},
    (Z_IMAGE, "transformer"): "n_heads",
    **{(pipeline, "vae"): "act_fn scaling_factor shift_factor" for pipeline in (SD3, FLUX, Z_IMAGE)},
    (FLUX, "text_encoder"): "num_attention_heads hidden_act num_hidden_layers eos_token_id",
    (FLUX, "text_encoder_2"): "feed_forward_proj num_heads num_layers",
    **{(pipeline, "text_encoder"): "hidden_act rms_norm_eps rope_parameters" for pipeline in (QWEN, Z_IMAGE)},
}


@pytest.mark.parametrize(("pipeline", "name"), NEEDED)
def test_an_entry_that_a_configuration_lacks_is_refused_or_changes_no_image(copy_of, pipeline, name):
    folder, needed, refused = copy_of(pipeline), set(NEEDED[pipeline, name].split()), set()
    library, class_name = json.loads(path_of(folder, "").read_text())[name]
    part_class = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    written, whole = json.loads(path_of(folder, name).read_text()), load_model(str(folder))

    def part():
        config = _load_part(part_class, folder, name, torch.float32, None).config
        config = config if library == "diffusers" else config.to_dict()
        return json.loads(json.dumps({key: value for key, value in config.items() if not key.startswith("_")}))

    config, images, text = part(), images_of(whole), written.get("text_config")
    for entry in text or written:
        content = {key: value for key, value in (text or written).items() if key != entry}
        path_of(folder, name).write_text(json.dumps({**written, "text_config": content} if text else content))
        try:
            if part() == config and entry not in needed:
                continue  # it is the default
            model = load_model(str(folder))
        except Exception:  # of any type: `load_model` makes them one line
            refused.add(entry)
        else:
            assert torch.equal(images_of(model), images) and model.default_size == whole.default_size, entry
    assert refused >= needed


CLASSES = [
    (SD3, "text_encoder", "CLIPTextModel", "CLIPTextModelWithProjection"),
    (SD3, "text_encoder_3", "UMT5EncoderModel", "T5EncoderModel"),
    (FLUX, "tokenizer", "Qwen2Tokenizer", "CLIPTokenizer"),
    (KLEIN, "text_encoder", "Qwen3Model", "Qwen3ForCausalLM"),
]
SAYS = "{}: model_index.json says {}, and {} is needed"
EDITS = [
    (QWEN, "vae", {"latents_mean": None}, "vae: its configuration has no 'latents_mean'"),
    (FLUX, "text_encoder_2", {"d_ff": 64}, "text_encoder_2: its config.json asks for weights of other shapes than"),
    (FLUX, "transformer", {"axes_dims_rope": [4, 4]}, "the transformer's axes_dims_rope add up to 8, and its heads"),
    (SD3, "", {"tokenizer_3": NONE}, "it has text_encoder_3 but no tokenizer_3$"),
    *((SD3, "", {name: NONE}, rf"{name}: .* says \[null, null\], not") for name in ("text_encoder", "tokenizer_2")),
    *((one, "", {name: ["transformers", said]}, SAYS.format(name, said, need)) for one, name, said, need in CLASSES),
    *((one, "", {"_class_name": other}, ".") for one in FLOW_FOLDERS for other in FLOW_FOLDERS if other != one),
]


@pytest.mark.parametrize(("pipeline", "name", "entries", "message"), EDITS)
def test_what_says_another_model_than_its_weights_is_refused(copy_of, pipeline, name, entries, message):
    folder = copy_of(pipeline)
    edit_json(path_of(folder, name), entries)
    assert_refused(folder, message)


WIDTH = "takes {} of width 7, and the text encoder gives {}"
MISFITS = [
    *((name, "vae", "latent_channels", 7, "the VAE has latents of 7 ch") for name in (SD3, FLUX, KLEIN, Z_IMAGE)),
    (QWEN, "vae", "z_dim", 7, "the VAE has latents of 7 channels, the transformer of 4"),
    (FLUX, "transformer", "in_channels", 24, "latents of 4 channels, the transformer of 6"),  # such as that of Fill
    (SD3, "transformer", "pooled_projection_dim", 7, WIDTH.format("pooled prompts", 20)),
    (SD3, "transformer", "joint_attention_dim", 40, "takes prompts of T5 of width 40, and the text encoder gives 32"),
    (SD3, "transformer", "joint_attention_dim", 23, "takes prompts of width 23, and the CLIPs give 24"),
    (FLUX, "transformer", "joint_attention_dim", 7, WIDTH.format("prompts", 32)),
    (FLUX, "transformer", "pooled_projection_dim", 7, WIDTH.format("pooled prompts", 16)),
    (KLEIN, "transformer", "joint_attention_dim", 7, WIDTH.format("prompts", 48)),
    (QWEN, "transformer", "joint_attention_dim", 7, WIDTH.format("prompts", 16)),
    (Z_IMAGE, "transformer", "cap_feat_dim", 7, WIDTH.format("prompts", 16)),
    *((name, "vae", "shift_factor", None, "the VAE has no shift_factor") for name in (SD3, FLUX, Z_IMAGE)),
    *((name, "vae", "scaling_factor", None, "the VAE has no scaling_factor") for name in (SD3, FLUX, Z_IMAGE)),
    *((QWEN, "vae", f"latents_{name}", [1.0], f"the VAE has no latents_{name} of 4") for name in ("mean", "std")),
    *((name, "transformer", "guidance_embeds", True, "takes a guidance scale") for name in (KLEIN, QWEN)),
    *((*part, None, "<my-cat>", r"the tokenizer knows \d+ tokens, its") for part in PARTS if "tokenizer" in part[1]),
    (QWEN, "transformer", "use_additional_t_cond", True, "the transformer takes another condition"),
    *((name, "scheduler", "use_flow_sigmas", True, "would draw at other levels") for name in (FLUX, KLEIN)),
]


@pytest.mark.parametrize(("pipeline", "name", "entry", "value", "message"), MISFITS)
def test_parts_that_do_not_fit_together_are_refused(pipeline, name, entry, value, message):
    parts = plain_flow_pipeline(FLOW_FOLDERS[pipeline]())
    part = getattr(parts, name)
    part.register_to_config(**{entry: value}) if entry else part.add_tokens(value)
    with pytest.raises(ValueError, match=message):
        as_model(parts)


def test_sd3_loads_without_t5_and_reads_prompts_by_clip_then(copy_of):
    folder, whole = copy_of(SD3), load_model(tiny_sd3())
    edit_json(path_of(folder, ""), {"text_encoder_3": NONE})
    model = load_model(str(folder))
    assert model.missing == ["text_encoder_3"] and len(model.text_encoders) == 2
    assert model.prompt_reader == (model.pipeline.tokenizer, 77) != whole.prompt_reader
    edit_json(path_of(folder, ""), {"tokenizer_3": NONE})
    other = load_model(str(folder))
    assert other.missing == ["text_encoder_3", "tokenizer_3"] and other.prompt_reader[1] == 77
    assert torch.equal(images_of(model), images_of(other)) and not torch.equal(images_of(other), images_of(whole))


def test_sd3_without_t5_is_loaded_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache_repository(tiny_sd3(with_t5=False), "someone/tiny-sd3", tmp_path)
    model = load_model("someone/tiny-sd3", cache_dir=str(tmp_path))
    assert torch.equal(images_of(model), images_of(load_model(tiny_sd3(with_t5=False))))


@pytest.mark.parametrize("pipeline", FLOW_FOLDERS)
def test_in_bfloat16_all_is_finite(pipeline):
    """The VAE is in bfloat16 too, though the configuration of some asks for float32."""
    model = load_model(FLOW_FOLDERS[pipeline](), dtype=torch.bfloat16)
    modules, images = [model.network, model.pipeline.vae, *model.text_encoders], images_of(model)
    assert {weight.dtype for module in modules for weight in module.parameters()} == {torch.bfloat16}
    assert all(values.isfinite().all() for values in [images, *model.embed(PROMPTS).values()])
    assert (images - images_of(load_model(FLOW_FOLDERS[pipeline]()))).abs().mean() < 0.05


# Schedulers

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
NEITHER = "is neither FlowMatchEulerDiscreteScheduler nor set to flow matching by use_flow_sigmas and flow_prediction"
REFUSED = [
    (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "has stochastic_sampling, which is not supported"),
    (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "has invert_sigmas, which is not supported"),
    *((getattr(diffusers, f"{name}Scheduler")(), NEITHER) for name in ("FlowMatchHeunDiscrete", "DDIM", "PNDM")),
    (UniPCMultistepScheduler(**{**FLOW, "use_flow_sigmas": False}), NEITHER),
    (UniPCMultistepScheduler(**{**FLOW, "prediction_type": "epsilon"}), NEITHER),
    (UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True), "has use_dynamic_shifting, which is not supported"),
    (DPMSolverMultistepScheduler(**FLOW, use_karras_sigmas=True), "has use_karras_sigmas, which is not supported"),
]
SOLVERS = [(SD3, DPMSolverMultistepScheduler), *((name, UniPCMultistepScheduler) for name in (SD3, QWEN, Z_IMAGE))]


def with_scheduler(folder, scheduler):
    """A folder after its scheduler has been replaced."""
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    edit_json(path_of(folder, ""), {"scheduler": ["diffusers", type(scheduler).__name__]})
    return folder


@pytest.mark.parametrize(("scheduler", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_scheduler_of_another_kind_is_refused_by_name(copy_of, scheduler, message):
    assert_refused(with_scheduler(copy_of(SD3), scheduler), f".*its scheduler, {type(scheduler).__name__},? {message}")


@pytest.mark.parametrize(("pipeline", "solver"), SOLVERS)
def test_a_solver_of_flow_matching_becomes_eulers_method(copy_of, tmp_path, monkeypatch, pipeline, solver):
    """With its shift: a plain pipeline with evenly spaced levels draws the same, and so does the model card's code."""
    folder = with_scheduler(copy_of(pipeline), solver(**FLOW))
    model, plain = load_model(str(folder)), plain_flow_pipeline(FLOW_FOLDERS[pipeline]())
    plain.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    args = {"height": 32, "width": 48, "num_inference_steps": 3, "guidance_scale": 4.0, "negative_prompt": None}
    args |= {"eta": 1.0, "noise": "ddim", "final_noise": 0.0, "sigmas": "native"}
    code = _example(SimpleNamespace(pretrained_model_name_or_path="model", **args), model, "lora", "a red seven")
    monkeypatch.chdir(tmp_path)
    exec(code.removeprefix("```py\n").split("pipeline.load_lora_weights")[0], scope := {})
    arguments = {"negative_prompt": "", **model.pipeline_arguments(SIZE, 3, model.guidance_scale), "output_type": "pt"}
    for drawing, levels in ((plain, {"sigmas": [1, 2 / 3, 1 / 3]}), (scope["pipeline"], {})):
        given = {**arguments, **levels, "prompt": list(PROMPTS), "negative_prompt": [arguments["negative_prompt"]] * 2}
        images = drawing(generator=seeded(range(2)), **given).images
        torch.testing.assert_close(images, images_of(model), rtol=0, atol=5e-5)
    assert ("sigmas=[1.0, " in code) == (pipeline == SD3)
    edit_json(path_of(folder, "scheduler"), {"flow_shift": None})
    assert_refused(folder, "scheduler: its configuration has no 'flow_shift'")
    with_scheduler(folder, model.pipeline.scheduler)  # now the pipeline's own, though it still says flow_shift
    assert load_model(str(folder)).leaves_levels("native") == (pipeline == SD3)
