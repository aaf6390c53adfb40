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
"""Wan in its three variants, each against its own pipeline of diffusers."""

import shutil

import pytest
import torch
from diffusion_models import VIDEO_FAMILIES, as_model, load_model
from diffusion_models.adapters import add_lora, load_adapter, load_lora, lora_disabled, restore_lora, save_lora
from diffusion_models.lora_files import LORA_FILE, SECOND_FILE
from diffusion_models.wan import EXPERTS
from peft import LoraConfig
from rlr_chains import Mix, gradients
from rlr_flow_models import plain_flow_pipeline
from rlr_models import assert_a_rollout_does_not_wait, edit_json, seeded
from rlr_utils import Schedule, backward_sweep, likelihood_ratio, rollout
from rlr_video_models import WAN_FOLDERS, tiny_wan, tiny_wan22, tiny_wan_a14b
from safetensors.torch import load_file

import diffusers
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler


PROMPTS = ["a red seven", "a blue two on a green field", "0"]
SIZE = (32, 48, 9)
FIRST_ORDER = {"algorithm_type": "dpmsolver++", "solver_order": 1}


@pytest.fixture(params=WAN_FOLDERS, scope="module")
def folder(request):
    return WAN_FOLDERS[request.param]()


@pytest.fixture(scope="module")
def model(folder):
    """No test may change it."""
    return load_model(folder, families=VIDEO_FAMILIES)


@pytest.fixture(scope="module")
def pipeline(folder):
    return plain_pipeline(folder)


def plain_pipeline(folder):
    """As diffusers loads it, with a solver of the first order, which is Euler's method, at the levels of its own."""
    pipeline = plain_flow_pipeline(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **FIRST_ORDER)
    return pipeline


def chain_of(model, num_steps=3, guidance_scale=5.0, size=SIZE, negative_prompt=None, **options):
    """The chain of the model under `PROMPTS`."""
    chain = model.make_chain(model.network, num_steps, size, guidance_scale=guidance_scale, **options)
    return chain.conditioned_on(model.embed(PROMPTS), model.embed_negative(negative_prompt))


def latents_of_chain(model, size=SIZE, **options):
    """What the chain draws without noise, from a generator for each video."""
    chain, generators = chain_of(model, size=size, eta=0.0, **options), seeded(range(len(PROMPTS)))
    x_T = model.draw_latents(chain, len(PROMPTS), size, generators)
    with torch.no_grad():
        return rollout(chain, x_T, generators).latents[0]


def drawn_by_pipeline(
    model, pipeline, num_steps=3, guidance_scale=5.0, size=SIZE, negative_prompt=None, output_type="latent", **options
):
    """What the plain pipeline draws from the same generators."""
    arguments = model.pipeline_arguments(size, num_steps, guidance_scale, negative_prompt, **options)
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(PROMPTS)
    generators = seeded(range(len(PROMPTS)))
    return pipeline(prompt=list(PROMPTS), generator=generators, output_type=output_type, **arguments).frames


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# Without noise


@pytest.mark.parametrize("size", [SIZE, (48, 32, 1), (32, 32, 13)])
def test_without_noise_the_chain_draws_the_videos_of_the_pipeline(model, pipeline, size):
    latents = latents_of_chain(model, size)
    videos, expected = model.decode(latents), drawn_by_pipeline(model, pipeline, size=size, output_type="pt")
    assert videos.shape == (3, size[2], 3, *size[:2]) == expected.shape and latents.shape == model.latents_shape(
        3, size
    )
    assert_close(videos, expected)
    assert (videos[0] - videos[1]).abs().max() > 1e-2
    # The levels are those that the pipeline has just used.
    schedule = model.noise_schedule(3, size)
    assert torch.equal(schedule.sigmas, pipeline.scheduler.sigmas)
    assert torch.equal(schedule.timesteps, pipeline.scheduler.timesteps)


def test_guidance_and_negative_prompts_are_the_pipelines(model, pipeline):
    drawn = {}
    for options in ({"guidance_scale": 1.0}, {}, {"negative_prompt": "a dog"}, {"guidance_scale": 0.0}):
        found = latents_of_chain(model, **options)
        assert_close(found, drawn_by_pipeline(model, pipeline, **options))
        drawn[str(options)] = found
    off, guided, negative, below = drawn.values()
    assert torch.equal(off, below)
    assert min((off - guided).abs().max(), (negative - guided).abs().max()) > 1e-3


def test_the_second_transformer_has_a_guidance_scale_of_its_own_if_it_is_given_one(model, pipeline):
    if model.experts is None:
        with pytest.raises(ValueError, match="guidance_scale_2 is for models with a transformer_2"):
            chain_of(model, guidance_scale_2=2.0)
        return
    plain = latents_of_chain(model)
    for scale in (5.0, 3.0, 0.5):
        found = latents_of_chain(model, guidance_scale_2=scale)
        assert_close(found, drawn_by_pipeline(model, pipeline, guidance_scale_2=scale))
        assert torch.equal(found, plain) == (scale == 5.0)
    assert torch.equal(
        *(latents_of_chain(model, guidance_scale=1.0, **one) for one in ({}, {"guidance_scale_2": 3.0}))
    )
    chain = chain_of(model, guidance_scale_2=3.0)
    repeated = chain.repeat(1, 2)
    x = torch.randn(model.latents_shape(1, SIZE)).expand(3, -1, -1, -1, -1)
    assert_close(repeated.mean(1, x[:2])[0], chain.mean(1, x)[1])


def test_a_step_at_the_boundary_is_of_the_first_transformer():
    """Also with a scheduler of flow matching, which is left as it is."""
    pipeline = plain_flow_pipeline(tiny_wan_a14b())
    pipeline.register_to_config(boundary_ratio=1.0)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.scheduler.set_timesteps(3)
    assert pipeline.scheduler.timesteps[0] == 1000
    model = as_model(pipeline)
    assert_close(latents_of_chain(model), drawn_by_pipeline(model, pipeline))


def test_the_length_of_prompts_is_the_pipelines_argument(folder, pipeline):
    model = load_model(folder)
    whole = latents_of_chain(model)
    model.max_sequence_length = 10
    found = latents_of_chain(model)
    assert_close(found, drawn_by_pipeline(model, pipeline))
    assert (found - whole).abs().max() > 1e-4


def test_the_scheduler_of_the_repositories_becomes_eulers_method_at_its_levels(model, folder):
    """The code of the model card gives a plain pipeline the scheduler with which it draws the same."""
    plain = plain_flow_pipeline(folder)
    assert type(plain.scheduler).__name__ == "UniPCMultistepScheduler"
    plain.scheduler.set_timesteps(3)
    torch.testing.assert_close(model.noise_schedule(3, SIZE).sigmas, plain.scheduler.sigmas, rtol=0, atol=3e-3)
    name, settings = model.scheduler_code(None)
    plain.scheduler = getattr(diffusers, name).from_config(plain.scheduler.config, **settings)
    assert_close(latents_of_chain(model), drawn_by_pipeline(model, plain))


def test_levels_that_the_pipeline_cannot_be_given_are_refused(model):
    with pytest.raises(ValueError, match="the levels linspace are not supported: a WanPipeline draws at those of its"):
        chain_of(model, sigmas="linspace")


# With noise


def add_random_lora(model):
    targets = model.lora_layers.split(",")
    for network in model.networks.values():
        network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))


@pytest.fixture(scope="module")
def exact_model(folder):
    """A model in float64 with a LoRA whose B is not zero."""
    model = load_model(folder, dtype=torch.float64)
    torch.manual_seed(0)
    add_random_lora(model)
    model.network.double()
    return model


@pytest.mark.parametrize(("guidance_scale", "noise"), [(1.0, "ddim"), (5.0, "ddim"), (5.0, "flow_sde")])
def test_the_sweep_is_exact(exact_model, guidance_scale, noise):
    """Any gamma, against one graph of the whole chain; in float64 but for the parts that diffusers computes in float32."""
    mixing = [0.0, 1.0, 0.7, 0.2]
    options = {"final_noise": 0.03} if noise == "ddim" else {"noise": noise, "eta": 0.7}
    if exact_model.experts is not None:
        options["guidance_scale_2"] = 3.0
    chain = chain_of(exact_model, 3, guidance_scale, **options)
    shape = exact_model.latents_shape(len(PROMPTS), SIZE)
    trajectory = rollout(chain, torch.randn(shape, dtype=torch.float64))
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    backward_sweep(chain, trajectory, mixing, reward_grad=weight, advantages=advantages)
    swept = [gradients(network) for network in exact_model.networks.values()]
    x = trajectory.latents[3]
    for k in (3, 2, 1):
        score = -likelihood_ratio(chain, trajectory, k, advantages) / len(PROMPTS)
        x = Mix.apply(chain.mean(k, x), mixing[k], score) + chain.sigma(k) * trajectory.noises[k]
    (-(weight * x).sum() / len(PROMPTS)).backward()
    for found, network in zip(swept, exact_model.networks.values()):
        expected = gradients(network)
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-6 * expected.norm()


def test_gradient_checkpointing_changes_no_gradient(folder):
    model, found = load_model(folder), []
    add_lora(model, rank=2, alpha=2, layers=["to_q"])
    latents = torch.randn(model.latents_shape(len(PROMPTS), SIZE))
    for _ in range(2):
        for k in (1, 3):
            chain_of(model).mean(k, latents).sum().backward()
        found.append(gradients(model.network))
        model.network.enable_gradient_checkpointing()
    assert all(network.is_gradient_checkpointing for network in model.networks.values())
    assert_close(*found)
    assert found[0].norm() > 0


def test_a_rollout_does_not_wait_for_the_device(folder):
    """After the noise of all steps, and tables of positions at the first, nothing goes to the device. With two transformers
    the timestep is asked for, which chooses."""
    model = load_model(folder)
    if model.experts is not None:
        return
    assert_a_rollout_does_not_wait(model, model.embed(PROMPTS), model.embed_negative(), SIZE)


# Adapters


def trained_model(folder):
    """A model with a LoRA as training adds it, whose weights are random."""
    model = load_model(folder)
    add_lora(model, rank=4, alpha=8, layers=model.lora_layers.split(","))
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.rand_like(parameter)
    return model


def test_a_saved_adapter_gives_the_same_videos_in_a_plain_pipeline(folder, model, pipeline, tmp_path):
    tuned = trained_model(folder)
    drawn, base = latents_of_chain(tuned), latents_of_chain(model)
    assert (drawn - base).abs().max() > 1e-2
    with lora_disabled(tuned):
        assert torch.equal(latents_of_chain(tuned), base)
    save_lora(tuned, tmp_path)
    plain = plain_pipeline(folder)
    plain.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    if tuned.experts is not None:
        assert (drawn_by_pipeline(model, plain) - drawn).abs().max() > 1e-3
        plain.load_lora_weights(tmp_path, weight_name=SECOND_FILE, load_into_transformer_2=True)
    assert_close(drawn_by_pipeline(model, plain), drawn)
    other = load_model(folder)
    load_adapter(other.pipeline, str(tmp_path), "tuned")
    assert_close(latents_of_chain(other), drawn)


def test_what_is_loaded_and_saved_again_is_the_same(folder, tmp_path):
    first, second = trained_model(folder), load_model(folder)
    save_lora(first, tmp_path / "first")
    load_lora(second, str(tmp_path / "first"))
    save_lora(second, tmp_path / "second")
    names = [LORA_FILE, SECOND_FILE][: len(first.networks)]
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == sorted(names)
    files = [[load_file(tmp_path / run / name) for name in names] for run in ("first", "second")]
    for found, expected in zip(*files):
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    if len(names) == 2:
        assert files[0][0].keys() == files[0][1].keys()
        assert not any(torch.equal(files[0][0][key], files[0][1][key]) for key in files[0][0])
    drawn, weights = latents_of_chain(first), [p for p in second.network.parameters() if p.requires_grad]
    assert {weight.dtype for weight in weights} == {torch.float32} and len(weights) == sum(map(len, files[0]))
    for weight in weights:
        weight.data.zero_()
    restore_lora(second, tmp_path / "first")
    assert torch.equal(latents_of_chain(second), drawn)


# One of two transformers


def test_of_two_transformers_a_file_does_not_say_which_one_is_its_own(tmp_path):
    save_lora(trained_model(tiny_wan_a14b()), tmp_path)
    model = load_model(tiny_wan_a14b())
    model.train_only("low_noise")
    for load in (lambda path: load_lora(model, path), lambda path: load_adapter(model.pipeline, path, "one")):
        with pytest.raises(ValueError, match=f"two transformers: give a folder with {LORA_FILE!r} or {SECOND_FILE!r}"):
            load(str(tmp_path / LORA_FILE))
        with pytest.raises(ValueError, match=f"it holds neither {LORA_FILE!r} nor {SECOND_FILE!r}"):
            load(str(tmp_path.parent))
    # What would be lost, or would be new, is not trained further.
    with pytest.raises(
        ValueError, match="a LoRA of transformer and transformer_2, and transformer_2 would be trained"
    ):
        load_lora(model, str(tmp_path))
    (tmp_path / SECOND_FILE).unlink()
    with pytest.raises(ValueError, match="it is a LoRA of transformer, and transformer_2 would be trained"):
        load_lora(model, str(tmp_path))
    assert not hasattr(model.experts.transformer, "peft_config")


@pytest.mark.parametrize("expert", EXPERTS)
def test_one_transformer_is_loaded_and_saved_alone(tmp_path, expert):
    folder, name = tiny_wan_a14b(), {"high_noise": LORA_FILE, "low_noise": SECOND_FILE}[expert]
    save_lora(trained_model(folder), tmp_path)
    for file in tmp_path.iterdir():
        if file.name != name:
            file.unlink()
    model, base = load_model(folder), latents_of_chain(load_model(folder))
    model.train_only(expert)
    load_lora(model, str(tmp_path))
    adapted = getattr(model.pipeline, EXPERTS[expert])
    assert list(model.networks.values()) == [adapted]
    assert {p.requires_grad for p in model.network.parameters()} == {True, False}
    assert all(p.requires_grad <= (p in set(adapted.parameters())) for p in model.network.parameters())
    drawn = latents_of_chain(model)
    assert (drawn - base).abs().max() > 1e-3
    with lora_disabled(model):
        assert torch.equal(latents_of_chain(model), base)
    save_lora(model, tmp_path / "again")
    (file,) = (tmp_path / "again").iterdir()
    assert file.name == name
    plain, other = plain_pipeline(folder), load_model(folder)
    plain.load_lora_weights(tmp_path / "again", weight_name=name, load_into_transformer_2=expert == "low_noise")
    assert_close(drawn_by_pipeline(model, plain), drawn)
    load_adapter(other.pipeline, str(tmp_path), "tuned")
    assert_close(latents_of_chain(other), drawn)


def test_the_trained_steps_are_those_of_the_trained_transformer():
    """The pipeline compares timesteps with its boundary; of four the first two or three are of the first."""
    model = load_model(tiny_wan_a14b())
    assert model.trained_steps(4, SIZE) is None
    timesteps = model.noise_schedule(4, SIZE).timesteps.tolist()
    first = [4 - i for i, timestep in enumerate(timesteps) if timestep >= 0.7 * 1000]
    assert 0 < len(first) < 4
    for expert, steps in (("high_noise", first), ("low_noise", sorted({1, 2, 3, 4} - {*first}, reverse=True))):
        model.train_only(expert)
        assert model.trained_steps(4, SIZE) == steps
    model = load_model(tiny_wan())
    assert model.trained_steps(4, SIZE) is None
    with pytest.raises(ValueError, match="the model has one network, which is trained"):
        model.train_only("low_noise")


@pytest.mark.parametrize("expert", EXPERTS)
@pytest.mark.parametrize("gamma", [1.0, 0.0, 0.6], ids=["full_bp", "ddpo", "mixed"])
def test_the_gradient_of_one_transformer_is_its_part_of_the_whole_gradient(expert, gamma):
    """In float64. Frozen steps are swept only where their cotangent reaches a trained one."""
    found = {}
    for experts in ("both", expert):
        torch.manual_seed(0)
        model = load_model(tiny_wan_a14b(), dtype=torch.float64)
        if experts != "both":
            model.train_only(experts)
        for name in EXPERTS.values():
            network = getattr(model.pipeline, name)
            network.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q"]))
            for i, parameter in enumerate(p for p in network.parameters() if p.requires_grad):
                parameter.data = torch.sin(torch.arange(parameter.numel()) + i).view_as(parameter).double() / 9
            network.requires_grad_(name in model.networks)
        chain, generator = chain_of(model, 4, final_noise=0.05), torch.Generator().manual_seed(1)
        x_T, weight = torch.randn(2, *model.latents_shape(3, SIZE), generator=generator, dtype=torch.float64)
        trajectory = rollout(chain, x_T, torch.Generator().manual_seed(2))
        schedule, steps = Schedule([gamma] * 5, 4), model.trained_steps(4, SIZE)
        schedule = schedule if steps is None else schedule.reaching(steps)
        advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
        backward_sweep(chain, trajectory, schedule, reward_grad=weight, advantages=advantages)
        found[experts] = gradients(getattr(model.pipeline, EXPERTS[expert]))
    wanted = set(steps) if gamma == 0 or expert == "low_noise" else {1, 2, 3, 4}
    assert set(schedule.swept) == wanted
    assert found["both"].abs().max() > 1e-6
    torch.testing.assert_close(found[expert], found["both"], rtol=1e-9, atol=1e-12)


# What a model is, and must be


def test_a_loaded_model_is_frozen_and_can_do_without_its_text_encoder(folder):
    model = load_model(folder, families=VIDEO_FAMILIES)
    modules = [part for part in model.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert len(modules) == 2 + len(model.networks)
    assert not any(p.requires_grad for module in [*modules, model.network] for p in module.parameters())
    assert not any(module.training for module in [*modules, *model.networks.values()])
    assert len(list(model.network.parameters())) == sum(len(list(n.parameters())) for n in model.networks.values())
    model.free_text_encoders()
    assert model.text_encoders == [] and model.network is not None


def test_sizes_that_the_pipeline_does_not_draw_are_refused(model):
    assert model.default_size == (480, 832, 81)
    for size in (SIZE, (480, 832, 81), (16, 16, 1)):
        model.check_size(size)
    for frames in (0, 8, 10, 80, -3):
        with pytest.raises(ValueError, match=f"videos of {frames} frames: not one and a multiple of 4"):
            model.check_size((32, 48, frames))
    for height, width in ((40, 48), (32, 56)):
        with pytest.raises(ValueError, match=f"videos of {height} x {width} pixels: not multiples of 16"):
            model.check_size((height, width, 9))


def test_in_half_precision_latents_and_some_layers_stay_in_float32(folder):
    model = load_model(folder, dtype=torch.bfloat16)
    kept = model.pipeline.transformer._keep_in_fp32_modules
    for network in model.networks.values():
        for name, parameter in network.named_parameters():
            expected = torch.float32 if any(part in name for part in kept) else torch.bfloat16
            assert parameter.dtype == expected, name
    assert {model.network.dtype, model.pipeline.vae.dtype, *(one.dtype for one in model.text_encoders)} == {
        torch.bfloat16
    }
    chain, x = chain_of(model, 2), torch.randn(model.latents_shape(len(PROMPTS), SIZE), requires_grad=True)
    mean = chain.mean(2, x)
    mean.sum().backward()
    videos = model.decode(x.detach())
    assert mean.dtype == videos.dtype == torch.float32 and x.grad.isfinite().all() and videos.isfinite().all()
    drawn = model.decode(latents_of_chain(model))
    assert (drawn - load_model(folder).decode(latents_of_chain(load_model(folder)))).abs().mean() < 0.02


def test_a_family_of_another_script_is_refused():
    with pytest.raises(ValueError, match="a WanPipeline is not supported here, but by another script"):
        load_model(tiny_wan(), families={})


EDITS = [
    ("transformer", "image_dim", 8, "the transformer takes an image .image_dim in its config.json., which is not s"),
    ("transformer", "added_kv_proj_dim", 8, "the transformer takes an image .added_kv_proj_dim in its config"),
    ("transformer", "in_channels", 9, "the transformer takes 9 channels and predicts 4: it is not one from text to"),
    ("transformer_2", "in_channels", 9, "the transformer takes 9 channels and predicts 4: it is not one from text to"),
    ("transformer", "patch_size", (2, 2, 2), r"the transformer takes patches of \[2, 2, 2\], not of \[1, 2, 2\]"),
    ("transformer", "text_dim", 7, "takes prompts of width 7, and the text encoder gives 32"),
    ("transformer_2", "text_dim", 7, "takes prompts of width 7, and the text encoder gives 32"),
    ("vae", "z_dim", 7, "the VAE has latents of 7 channels, the transformer of 4"),
    ("vae", "latents_mean", None, "the VAE has no latents_mean of 4 channels in its config.json"),
    ("vae", "latents_std", [1.0], "the VAE has no latents_std of 4 channels in its config.json"),
    (
        "vae",
        "scale_factor_spatial",
        8,
        "the VAE has layers for a scale_factor_spatial of 4, and its config.json says 8",
    ),
    ("vae", "scale_factor_temporal", 8, "the VAE has layers for a scale_factor_temporal of 4, and its config.json s"),
    ("pipeline", "boundary_ratio", None, "of a transformer_2 and a boundary_ratio in its model_index.json it has onl"),
    ("pipeline", "transformer_2", None, "of a transformer_2 and a boundary_ratio in its model_index.json it has onl"),
    ("pipeline", "transformer", None, "it has no transformer"),
    ("tokenizer", None, "<my-cat>", r"the tokenizer knows \d+ tokens, its text encoder only 98"),
]


@pytest.mark.parametrize(("name", "entry", "value", "message"), EDITS)
def test_parts_that_do_not_fit_together_are_refused(name, entry, value, message):
    pipeline = plain_flow_pipeline(tiny_wan_a14b())
    part = pipeline if name == "pipeline" else getattr(pipeline, name)
    if entry is None:
        part.add_tokens(value)
    elif entry in pipeline.components:
        setattr(pipeline, entry, value)
    else:
        part.register_to_config(**{entry: value})
    with pytest.raises(ValueError, match=message):
        as_model(pipeline)


def test_other_latents_of_the_second_transformer_are_refused():
    pipeline = plain_flow_pipeline(tiny_wan_a14b())
    pipeline.transformer_2.register_to_config(in_channels=9, out_channels=9)
    with pytest.raises(ValueError, match="the transformer takes latents of 4 channels, transformer_2 of 9"):
        as_model(pipeline)


FILES = [
    ("transformer_2", None, "transformer_2: .*No such file or directory"),
    ("transformer", None, "transformer: .*No such file or directory"),
    ("text_encoder", None, "text_encoder: .*No such file or directory"),
    ("vae", None, "vae: .*No such file or directory"),
    ("tokenizer", None, "tokenizer: its vocabulary is missing, one of the files"),
    ("scheduler", None, "scheduler: .*No such file or directory"),
    ("", {"transformer_2": [None, None]}, "of a transformer_2 and a boundary_ratio in its model_index.json it has o"),
    ("", {"transformer": [None, None]}, "it has no transformer$"),
    ("", {"boundary_ratio": None}, "of a transformer_2 and a boundary_ratio in its model_index.json it has only one"),
    (
        "",
        {"transformer_2": ["diffusers", "FluxTransformer2DModel"]},
        "transformer_2: .* WanTransformer3DModel is need",
    ),
    ("", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder: .* UMT5EncoderModel is needed"),
]


@pytest.mark.parametrize(("name", "entries", "message"), FILES)
def test_what_a_folder_lacks_is_refused_by_name(tmp_path, name, entries, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_a14b(), folder)
    if entries is None:
        shutil.rmtree(folder / name)
    else:
        edit_json(folder / "model_index.json", entries)
    with pytest.raises(ValueError, match=f"^'{folder}' cannot be loaded: {message}") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


def test_the_variants_are_told_from_each_other():
    experts, steps = [], []
    for folder in (tiny_wan(), tiny_wan22(), tiny_wan_a14b()):
        model = load_model(folder)
        experts.append(list(model.networks))
        model.network.register_forward_pre_hook(lambda module, inputs: steps.append(inputs[1].shape))
        latents_of_chain(model, guidance_scale=1.0)
    assert experts == [["transformer"], ["transformer"], ["transformer", "transformer_2"]]
    assert steps == [(3,)] * 3 + [(3, 3 * 2 * 3)] * 3 + [(3,)] * 3


def test_a_vae_of_images_is_refused(folder):
    with pytest.raises(ValueError, match="its VAE is an AutoencoderKLWan, which an AutoencoderTiny cannot replace"):
        load_model(folder, vae=AutoencoderTiny())
