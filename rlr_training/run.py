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
"""What a run is made of and how it begins. The loop is in the scripts, the end in `finish`."""

import math
from functools import partial
from typing import Any, Callable, NamedTuple, Optional

from accelerate.logging import get_logger
from accelerate.utils import set_seed
from diffusion_models.adapters import add_lora, files_of, load_lora, lora_disabled
from diffusion_models.embeddings import PromptEmbeds
from diffusion_models.loading import load_vae
from reward_models import parse_reward_floors
from reward_models.features import load_features
from rlr_utils import RLRStep, Settings
from rlr_utils.settings import NEED_GRADIENT, check_reward

from .after_step import finish_step
from .chains import (
    conditioned,
    encode_prompts_of_run,
    make_chain,
    sampler_of,
    sampling_options,
    set_defaults,
    set_size,
    settle_noise,
    size_of,
)
from .checkpoints import check_same_run, check_whole, configuration, find_start, load_checkpoint, register_state
from .checks import flag_of, rlr_settings
from .errors import bad_input_ends_the_run, naming
from .evaluation import EarlyStopping, HeldOut, load_base, make_draw
from .hub import (
    command_of,
    create_repository,
    evaluation_command_of,
    license_of,
    save_model_card,
    typed_flags,
)
from .memory import footprint, warn_if_too_much
from .metrics import print_plan, start_trackers, trim_metrics
from .optimizer import Optimization, images_of_a_step, make_optimization
from .output_dir import check_output_dir, check_writable, write_configuration
from .processes import frozen_dtype, make_accelerator, to_device
from .prompts import PromptSampler, load_training_prompts, warn_of_long_prompts
from .scoring import BatchScorer, check_score_frames, load_reward_sum, settle_batch_sizes
from .trial import compile_blocks, settle_memory, try_model
from .units import RewardUnits, make_units, measure_units


logger = get_logger(__name__, log_level="INFO")


class Run(NamedTuple):
    """What the loop of a script works with.

    Attributes:
        accelerator: accelerate's.
        model: `DiffusionModel`, whose network has the adapter.
        rlr: `RLRStep`.
        chain_of: `chain_of(prompts) -> DenoisingChain` of a batch.
        draw: `draw(prompts, batch_size, ...)` for validation and held-out rewards, see `evaluation.make_draw`.
        scorer_of: `scorer_of(prompts) -> BatchScorer` of the images in which a rollout ends.
        prediction_scorer_of: the same for predicted images, with --baseline_vae.
        sampler: `PromptSampler`.
        optimization: `Optimization` of the adapter.
        heldout: `HeldOut`, or `None`.
        stopping: `EarlyStopping`.
        rewards: `WeightedSum` that is trained for.
        units: `RewardUnits` of them, or `None`.
        command: starts the same run.
        save_card: `save_card(command, step, results=None)` writes the model card.
        evaluation_command: compares the adapter with the base model.
        repo_id: of the repository on the Hub, or `None`.
        first_step: the step that the run starts after.
    """

    accelerator: Any
    model: Any
    rlr: RLRStep
    chain_of: Callable
    draw: Callable
    scorer_of: Callable
    prediction_scorer_of: Callable
    sampler: PromptSampler
    optimization: Optimization
    heldout: Optional[HeldOut]
    stopping: EarlyStopping
    rewards: Any
    units: Optional[RewardUnits]
    command: str
    save_card: Callable
    evaluation_command: str
    repo_id: Optional[str]
    first_step: int


def prepare(args, script, tracker, families, defaults):
    """Load and check everything, claim the output folder, and resume if the arguments say so; returns `Run`.

    Args:
        args: of the script; what they leave open is set.
        script, tracker: name of the script, and of its runs in the trackers.
        families: that the script trains, see `diffusion_models`.
        defaults: the arguments of the script without any flag.

    Raises:
        RunError: if something is wrong with the input, before anything is written.
    """
    flags = typed_flags(args, defaults)
    with bad_input_ends_the_run():
        check_writable(args.output_dir)
        accelerator = make_accelerator(args)
        prompts = load_training_prompts(args)
        set_num_steps(args, accelerator, len(prompts))
        resume_path, first_step = find_start(args, accelerator)
        model = load_base(args, frozen_dtype(args.mixed_precision), families)
        config = fit_to_model(args, accelerator, model, prompts, resume_path)
        rewards, heldout = load_run_rewards(args, prompts, accelerator)
        check_score_frames(args, model, rewards)
        baseline_vae = load_baseline_vae(args, frozen_dtype(args.mixed_precision))
        trainable = add_adapter(args, model)
        rlr = make_rlr_step(args, accelerator, model, rewards, trainable)
        schedule = rlr.draw_schedule()
        check_output_dir(args, resume_path)
        sampler, stopping = make_sampler(args, accelerator, prompts), EarlyStopping(args.early_stop_patience)
        units = make_units(args, rewards, prompts)
        embeds = encode_prompts(args, accelerator, model, sampler, (heldout, units), first_step)
        network = to_device(args, accelerator, model, baseline_vae)
        chain = make_training_chain(args, accelerator, model, network, rlr, schedule)
        optimization = make_optimization(args, accelerator, trainable)
        others = {"clipping": optimization.clipping, "early_stopping": stopping, "reward_units": units}
        register_state(accelerator, model, config, sampler, rlr, others, optimization.ema)
        chain_of, costs = make_chain_of(args, accelerator, model, chain, schedule, embeds, prompts, baseline_vae)
        scored_bytes = settle_batch_sizes(args, model, [rewards] if heldout is None else heldout.sums, prompts[0])
        expected = footprint(args, model, (heldout or rewards).modules, baseline_vae, costs.swept_bytes, scored_bytes)
        start(args, accelerator, resume_path, stopping)
        repo_id, base_license = claim_output_dir(args, accelerator, config, tracker)

    run = Run(
        *(accelerator, model, rlr, chain_of, make_draw(args, model, embeds)),
        scorer_of=partial(BatchScorer, args, accelerator, model, rewards),
        prediction_scorer_of=partial(BatchScorer, args, accelerator, model, rewards, vae=baseline_vae),
        sampler=sampler,
        optimization=optimization,
        heldout=heldout,
        stopping=stopping,
        rewards=rewards,
        units=units,
        command=command_of(args, flags, accelerator, script),
        save_card=partial(save_model_card, args, model, prompts[0], repo_id, base_license),
        evaluation_command=evaluation_command_of(args, flags),
        repo_id=repo_id,
        first_step=first_step,
    )
    begin(args, run, config, tracker, schedule, costs, expected)
    return run


def set_num_steps(args, accelerator, num_prompts):
    """Set --max_train_steps, if it is not given, to --num_train_epochs passes over the prompts."""
    if args.max_train_steps is None:
        images = args.num_train_epochs * num_prompts * args.images_per_prompt
        args.max_train_steps = math.ceil(images / images_of_a_step(args, accelerator))


def load_run_rewards(args, prompts, accelerator):
    """The reward, and `HeldOut` or `None`.

    Raises:
        ValueError: for a reward that cannot be loaded, or that does not go with the estimator.
    """
    device, batch_size = accelerator.device, args.reward_batch_size
    rewards, held, heldout = load_reward_sum(args, args.reward, prompts, device, batch_size), None, None
    if args.heldout_reward is not None:
        with naming("--feature_model"):
            features = load_features(args.feature_model, device)
        held = load_reward_sum(args, args.heldout_reward, prompts, device, batch_size)
        heldout = HeldOut(args, accelerator, rewards, held, features, prompts)
    rewards.normalized = args.reward_normalize
    for name, floor in parse_reward_floors(args.reward_floor).items():
        rewards.set_floor(name, floor, held)
    if args.reward_offload:  # not before: custom rewards are tried on the device that they will be called on
        for module in rewards.modules if heldout is None else heldout.modules:
            module.to("cpu")
    with naming(f"--reward {args.reward!r}{''.join(f' --reward_floor {one}' for one in args.reward_floor)}:"):
        settings = Settings(**rlr_settings(args))
        check_reward(settings, rewards.has_gradient, not rewards.differentiable, name=flag_of)
    weighs_rewards = args.gradient_estimator not in NEED_GRADIENT and not rewards.differentiable
    if images_of_a_step(args, accelerator) == 1 and (weighs_rewards or args.gradient_estimator == "ddpo"):
        logger.warning(
            "one image a step: its reward has no other to be compared with, and the gradient is far noisier; use at least two"
            " (--train_batch_size or --gradient_accumulation_steps)"
        )
    return rewards, heldout


def fit_to_model(args, accelerator, model, prompts, resume_path):
    """Set what the arguments leave to the model, and return the `configuration` of the run.

    Raises:
        ValueError: if the model cannot draw such images in so many steps, or the checkpoint is of another run.
    """
    set_size(args, model)
    set_defaults(args, model)
    if getattr(args, "train_experts", "both") != "both":
        with naming(f"--train_experts {args.train_experts}:"):
            model.train_only(args.train_experts)
    if accelerator.is_main_process:
        encoded = [*prompts, *(args.validation_prompts or []), args.negative_prompt]
        warn_of_long_prompts(args.prompts, encoded, *model.prompt_reader)
    config = configuration(args, accelerator.num_processes)
    if resume_path is not None:
        check_same_run(config, resume_path)
        check_whole(config, files_of(model).values(), resume_path)
    with naming(f"--num_inference_steps {args.num_inference_steps}:"):
        model.noise_schedule(args.num_inference_steps, size_of(args))
    return config


def load_baseline_vae(args, dtype):
    """The decoder of --baseline_vae, or `None` for the model's own.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if args.baseline_vae is None:
        return None
    with naming("--baseline_vae"):
        return load_vae(args.baseline_vae, "AutoencoderTiny", dtype, args.cache_dir)


def add_adapter(args, model):
    """Give the network its LoRA, the same on every rank; returns its parameters, in float32.

    Raises:
        ValueError: if --adapter_path cannot be loaded, or the network has none of --lora_layers.
    """
    set_seed(args.seed)
    if args.adapter_path is not None:
        with naming("--adapter_path"):
            load_lora(model, args.adapter_path, args.cache_dir)
    else:
        layers = [name.strip() for name in args.lora_layers.split(",")]
        with naming(f"--lora_layers {args.lora_layers!r}:"):
            add_lora(model, rank=args.rank, alpha=args.lora_alpha or args.rank, layers=layers)
    return [p for p in model.network.parameters() if p.requires_grad]


def make_rlr_step(args, accelerator, model, rewards, trainable):
    """`RLRStep` with the settings of the flags."""
    steps = model.trained_steps(args.num_inference_steps, size_of(args))
    # Everything else about the settings has been checked with the arguments and the reward.
    with naming(f"--subchain_length {args.subchain_length}:" if steps is None else "--train_experts:"):
        return RLRStep(
            args.num_inference_steps,
            rewards.has_gradient,
            black_box=not rewards.differentiable,
            **rlr_settings(args),
            trained_steps=steps,
            base_model=partial(lora_disabled, model),
            parameters=trainable,
            gather=accelerator.gather,
            shared_seed=args.seed if args.shard else None,
        )


def encode_prompts(args, accelerator, model, sampler, others, first_step):
    """`PromptEmbeds` of the run, before its networks take the memory of the device.

    Args:
        sampler: `PromptSampler`, as at the beginning of the run; it is left unchanged.
        others: each has the prompts of images that it draws, or is `None`.
        first_step: the step that the run starts after.
    """
    embeds = PromptEmbeds(model, accelerator.device)
    embeds.negative(args.negative_prompt)
    drawn = [
        *(args.validation_prompts or []),
        *(prompt for one in others if one is not None for prompt in one.prompts),
    ]
    encode_prompts_of_run(args, embeds, sampler, drawn, first_step, accelerator.is_local_main_process)
    return embeds


def make_training_chain(args, accelerator, model, network, rlr, schedule):
    """The model's chain without prompts, under the sampling flags.

    Raises:
        ValueError: if the schedule cannot be swept on it.
    """
    settle_noise(args, model, rlr, schedule)
    chain = make_chain(args, model, network, accelerator.device, sampling_options(args, model))
    with naming(f"{sampler_of(args)}, --reward {args.reward!r}:"):
        rlr.check_chain(chain, schedule)
    return chain


def make_chain_of(args, accelerator, model, chain, schedule, embeds, prompts, baseline_vae):
    """(`chain_of(prompts) -> DenoisingChain` of a batch, `Costs` of its calls), with a compiled network if one is asked for.

    Args:
        chain: without prompts.
        schedule: of the sweep, which the compiler is tried on.
        embeds: `PromptEmbeds`.
        prompts: of the run.
        baseline_vae: from `load_baseline_vae`.

    Raises:
        ValueError: if the model cannot draw an image, or --baseline_vae cannot decode it.
    """
    batch = prompts[:1] * args.train_batch_size
    settle_memory(args, model, chain, lambda chain: conditioned(args, chain, embeds)(batch))
    # The calls of one image are no CUDA graphs.
    plain = make_chain(args, model, model.network, chain.timesteps.device, sampling_options(args, model))
    plain_of, chain_of = (conditioned(args, one, embeds) for one in (plain, chain))
    costs = try_model(args, model, plain_of(prompts[:1]), baseline_vae)
    compile_blocks(args, accelerator, model, chain_of(batch), schedule)
    return chain_of, costs


def begin(args, run, config, tracker, schedule, costs, expected):
    """Start the trackers, print the plan of the run, and score the base model's held-out images.

    Args:
        run: `Run`.
        config, tracker: of `prepare`.
        schedule: of the sweep.
        costs: `Costs`.
        expected: `Footprint`.
    """
    accelerator, heldout = run.accelerator, run.heldout
    start_trackers(accelerator, config, tracker, run.first_step)
    if accelerator.is_main_process:
        trim_metrics(args.output_dir, run.first_step)
    chain = run.chain_of(run.sampler.prompts[:1])
    print_plan(accelerator, args, run.rlr, schedule, chain, run.sampler, run.optimization.trainable, costs, expected)
    warn_if_too_much(expected)
    with bad_input_ends_the_run():
        if run.units is not None and run.first_step == 0:
            measure_units(args, run)
        if heldout is not None:
            run.stopping.start(heldout.measure_base(run.model, run.draw))
            finish_step(args, run)


def start(args, accelerator, resume_path, stopping):
    """Seed this rank, and resume from a checkpoint, which brings its own random state."""
    # What is drawn from here on, such as noise and perturbations, is each rank's own, but for `shared_seed`.
    set_seed(args.seed, device_specific=True)
    if resume_path is not None:
        load_checkpoint(accelerator, resume_path)
    if stopping.reason(0) is not None:
        logger.warning(f"nothing is left to do: {resume_path!r} is of a run that was stopped early")


def make_sampler(args, accelerator, prompts):
    """`PromptSampler` of this rank."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    return PromptSampler(prompts, args.seed, rank, num_ranks, args.images_per_prompt)


def claim_output_dir(args, accelerator, config, tracker):
    """Make the output folder, and the repository on the Hub.

    Returns:
        (repository on the Hub, license of the base model), `None` where there is none, and on all ranks but the first.

    Raises:
        ValueError: if the repository cannot be had.
    """
    # All have found the output folder free by then.
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None, None
    base_license = license_of(args.pretrained_model_name_or_path, args.hub_token)
    repo_id = create_repository(args)
    write_configuration(args, config, tracker)
    return repo_id, base_license
