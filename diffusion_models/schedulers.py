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
"""The samplers that a chain can take its steps from."""

# {name: (class in diffusers, what its configuration must say)}. The configuration of PNDM, SD 1.4's default, does not say
# clip_sample, and the defaults of DDIM and DDPM would clip the latents. DPM-Solver of higher order remembers earlier steps.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
}


# What a network may predict on a schedule of betas.
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def make_scheduler(name, config):
    """The scheduler of a key of `SCHEDULERS`, or DDIM for `None`, from the configuration of another scheduler.

    Raises:
        ValueError: as `check_noise_schedule` does, and for a beta schedule that the new scheduler does not know.
    """
    import diffusers

    check_noise_schedule(config)
    class_name, settings = SCHEDULERS[name or "ddim"]
    try:
        return getattr(diffusers, class_name).from_config(config, **settings)
    except NotImplementedError as error:
        raise ValueError(f"the configuration of its scheduler: {error}") from error


def make_flow_scheduler(name, config):
    """`FlowMatchEulerDiscreteScheduler` from the configuration of a flow-matching model's scheduler.

    Of a multistep scheduler set to flow matching it takes over the shift. Its steps between levels are not those of the
    multistep scheduler, which remembers earlier ones.

    Raises:
        ValueError: naming a scheduler of another kind, or an entry that would change the chain.
    """
    import diffusers

    class_name = config.get("_class_name")
    if name not in (None, "ddim"):  # whose steps the chain takes
        raise ValueError(
            f"the scheduler {name} is for models that were trained on a schedule of betas, not for this one"
        )
    if class_name == "FlowMatchEulerDiscreteScheduler":
        unsupported, settings = ("stochastic_sampling", "invert_sigmas"), {}
        # Left over from a multistep scheduler that it was made from.
        config = {entry: value for entry, value in config.items() if entry != "flow_shift"}
    elif config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        unsupported = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        settings = {"shift": config["flow_shift"]}
    else:
        raise ValueError(
            f"its scheduler, {class_name or 'whose configuration does not say its class'}, is neither"
            " FlowMatchEulerDiscreteScheduler nor set to flow matching by use_flow_sigmas and flow_prediction"
        )
    for entry in unsupported:
        if config.get(entry):
            raise ValueError(f"the configuration of its scheduler, {class_name}, has {entry}, which is not supported")
    return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, **settings)


def check_noise_schedule(config):
    """Refuse a scheduler whose levels of noise do not come from betas at whole timesteps.

    diffusers would take the configuration all the same: of an EDM or flow-matching scheduler the others use no entry, and
    their own default betas would be those of no model.

    Args:
        config: of a scheduler.

    Raises:
        ValueError: naming its class.
    """
    prediction_type = config.get("prediction_type", "epsilon")
    betas, num_timesteps = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        problem = "has no schedule of betas"
    elif config.get("use_flow_sigmas") or prediction_type == "flow_prediction":
        problem = "is set to flow matching"
    elif config.get("timestep_type") == "continuous":
        problem = "is set to continuous timesteps"
    elif prediction_type not in PREDICTION_TYPES:
        problem = f"has the prediction_type {prediction_type!r}, not one of {', '.join(PREDICTION_TYPES)}"
    elif betas is not None and len(betas) != num_timesteps:
        problem = f"has trained_betas for {len(betas)} timesteps, and num_train_timesteps says {num_timesteps}"
    elif config.get("timestep_spacing", "leading") not in TIMESTEP_SPACINGS:
        problem = f"has the timestep_spacing {config['timestep_spacing']!r}, not one of {', '.join(TIMESTEP_SPACINGS)}"
    elif "original_inference_steps" in config:  # LCM, TCD
        problem = "is for a model that was distilled to a few steps"
    else:
        return
    raise ValueError(
        f"its scheduler, {config.get('_class_name', type(config).__name__)}, {problem}: the chain needs a model that was"
        " trained to remove noise at levels given by betas, as Stable Diffusion was"
    )
