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
"""Images of fixed seeds: validation and held-out rewards."""

import math
import os
import re
from functools import partial

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from diffusion_models import FAMILIES, load_model
from diffusion_models.adapters import lora_disabled
from diffusion_models.embeddings import PromptEmbeds
from diffusion_models.loading import load_vae
from diffusion_models.video import VideoModel
from reward_models.features import diversity, drift, mean_over_frames, video_figures
from rlr_utils import rollout
from tqdm.auto import tqdm

from diffusers.training_utils import offload_models

from .chains import drawing_chain_of, kind_of, size_of
from .display import shown
from .errors import RunError, naming, saving
from .memory import warn_before_loading
from .offload import decoding, place
from .output_dir import VALIDATION_FOLDER
from .prompts import texts_of
from .services import agreeing_on_services
from .shares import Share
from .videos import save_image, strips


logger = get_logger(__name__, log_level="INFO")

# Images that are compared have these seeds, whatever the seed of the run: other noise than any run trains on.
EVALUATION_SEED = 1_000_000
# Those by which the best adapter is chosen have other seeds, or the comparison would flatter it.
HELDOUT_SEED = 2_000_000


def make_draw(args, model, embeds=None):
    """`draw(prompts, batch_size, ...)`, see `generate`, for the model as it is when it draws.

    Args:
        args: of a script, for the sampling flags, --prompts, --dcot_boundaries and --decode_batch_size.
        model: `DiffusionModel`.
        embeds: `PromptEmbeds` of the model, or `None` for new ones.
    """
    return partial(generate, args, model, drawing_chain_of(args, model, embeds))


def encode_and_place(args, model, prompts, state):
    """`PromptEmbeds` of some prompts; network and VAE come to the device when the text encoders are gone, see `place`."""
    embeds = encode(args, model, prompts, state.device)
    embeds.free_encoders()
    place(args, model, state)
    return embeds


def encode(args, model, prompts, device):
    """`PromptEmbeds` of some prompts, with the layers that an adapter has in the text encoders at the moment."""
    embeds = PromptEmbeds(model, device)
    embeds.negative(args.negative_prompt)
    embeds.encode_all(texts_of(args.prompts, prompts))
    return embeds


@torch.no_grad()
def generate(args, model, chain_of, prompts, batch_size, desc=None, first_seed=EVALUATION_SEED):
    """One image or video per prompt, from consecutive seeds: (N, 3, H, W) or (N, F, 3, H, W) in [0, 1] on the CPU.

    They are those that the pipeline draws from the same generators.

    Args:
        batch_size: images drawn at a time.
        desc: of the progress bar; without one there is no bar.
    """
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc=desc, disable=desc is None):
        batch = prompts[start : start + batch_size]
        # Generators of the CPU, so that a seed is the same image on every device.
        generators = [torch.Generator().manual_seed(first_seed + start + i) for i in range(len(batch))]
        chain = chain_of(batch)
        x_T = model.draw_latents(chain, len(batch), size_of(args), generators)
        latents = rollout(chain, x_T, generators).latents[0]
        with decoding(args, model, latents.device):
            images += [model.decode(part).cpu() for part in latents.split(args.decode_batch_size)]
    return torch.cat(images)


def log_validation(draw, args, accelerator, step):
    """Draw images of the validation prompts, from the same seeds each time, as files and for every tracker.

    All processes draw. Images are PNG files. Videos are GIF files, of which TensorBoard gets the frames beside each other.

    Raises:
        RunError: if the files cannot be written.
    """
    folder = os.path.join(args.output_dir, VALIDATION_FOLDER, f"step-{step:06}")
    logger.info(
        f"Running validation: {args.num_validation_images} {kind_of(args)}s of each validation prompt, in {folder}"
    )
    prompts = [prompt for prompt in args.validation_prompts for _ in range(args.num_validation_images)]
    share, paths = Share(accelerator, len(prompts)), []
    drawn = draw(share.of(prompts), args.train_batch_size, first_seed=EVALUATION_SEED + share.first)
    images = share.gathered(drawn)
    if not accelerator.is_main_process:
        return
    with saving(folder):
        os.makedirs(folder, exist_ok=True)
        for number, (image, prompt) in enumerate(zip(images, prompts), 1):
            words = "-".join(re.findall(r"\w+", prompt))[:40]
            paths.append(save_image(image, os.path.join(folder, f"{number:03}-{words}"), getattr(args, "fps", None)))
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            shown = images if images.dim() == 4 else strips(images)
            tracker.writer.add_images("validation", shown.numpy(), step)
        if tracker.name == "wandb":
            import wandb

            kind = wandb.Image if images.dim() == 4 else wandb.Video
            tracker.log(
                {"validation": [kind(path, caption=prompt) for path, prompt in zip(paths, prompts)]}, step=step
            )


def heldout_prompts(pool, num_images):
    """The prompts of held-out images: four images in a row of each of some prompts, which are spread over all."""
    return [pool[i // 4 * len(pool) // (num_images // 4)] for i in range(num_images)]


class HeldOut:
    """A reward that is not trained on, with diversity and drift, on images of fixed seeds.

    Args:
        args: of the script.
        accelerator: accelerate's, all of whose processes draw and score.
        rewards, heldout: `WeightedSum` of the reward that is trained on, and of the held-out one.
        features: from `reward_models.features.load_features`.
        prompts: of the run.
    """

    def __init__(self, args, accelerator, rewards, heldout, features, prompts):
        self.args, self.rewards, self.heldout, self.features = args, rewards, heldout, features
        self.accelerator = accelerator
        self.modules = (*rewards.modules, *heldout.modules, features)
        pool = args.validation_prompts or prompts
        self.prompts = heldout_prompts(pool, args.num_heldout_images)
        self.base, self.base_embeds = {}, None

    @property
    def sums(self):
        return [self.rewards, self.heldout]

    def _measure(self, draw):
        """The figures of the model as it is, {name: number}, and the embeddings (N, D) of its images."""
        args, device = self.args, self.accelerator.device
        share = Share(self.accelerator, len(self.prompts))
        prompts = share.of(self.prompts)
        try:
            images = draw(prompts, args.train_batch_size, first_seed=HELDOUT_SEED + share.first)
            with (
                agreeing_on_services(args, *self.sums),
                offload_models(*self.modules, device=device, offload=args.reward_offload),
            ):
                by_frame = self.features(images, args.decode_batch_size)
                trained = self.rewards.plain(self.rewards(images, prompts, device=device))
                held = self.heldout(images, prompts, device=device).total
        except ValueError as error:
            raise RunError(f"held-out images: {error}") from error
        changes = video_figures(images, by_frame)
        embeds, trained, held, *changes_of_all = (
            share.gathered(values) for values in (mean_over_frames(by_frame), trained, held, *changes.values())
        )
        figures = {
            "heldout_mean": held.mean().item(),
            "heldout_std": held.std().item(),
            "heldout_trained_mean": trained.mean().item(),
            "diversity": diversity(embeds, self.prompts),
            **{name: values.mean().item() for name, values in zip(changes, changes_of_all)},
        }
        return figures, embeds

    def measure_base(self, model, draw):
        """Keep the figures of the base model and the embeddings of its images, and log them; returns its held-out reward."""
        with lora_disabled(model):
            figures, self.base_embeds = self._measure(draw)
        self.base = figures
        listed = ", ".join(f"{name} {shown(value)}" for name, value in figures.items())
        logger.info(f"base model on {len(self.prompts)} {kind_of(self.args)}s: {listed}")
        return figures["heldout_mean"]

    def measure(self, draw):
        """The figures of the model as it is, {name: number}."""
        figures, embeds = self._measure(draw)
        return {**figures, "drift": drift(self.base_embeds, embeds).mean().item()}


class EarlyStopping:
    """The best held-out reward so far, and how many scorings ago that was.

    Ties go to the later adapter, which has trained longer: a reward may stay at its highest value, such as an accuracy of 1.

    Args:
        patience: stop after so many scorings below the best; `None` for never.

    Attributes:
        pending: the line in metrics.jsonl of a step whose held-out images could not be scored, or `None`.
    """

    def __init__(self, patience):
        self.patience, self.pending = patience, None
        self.best, self.best_step, self.waited = -math.inf, 0, 0

    def start(self, score):
        """Begin with the score of the base model, unless a resumed run has scores already."""
        if self.best == -math.inf:
            self.best = score

    def update(self, step, score):
        """(whether this is the best score, why to stop or `None`)."""
        is_best = score >= self.best
        if is_best:
            self.best, self.best_step, self.waited = score, step, 0
        else:
            self.waited += 1
        return is_best, self.reason(step)

    def reason(self, step):
        """Why to stop after a step, or `None`."""
        if self.patience is None or self.waited < self.patience:
            return None
        best, kept = (
            (f"step {self.best_step}", "that adapter is in best/")
            if self.best_step
            else ("the base model", "no adapter was better")
        )
        reason = f"the held-out reward has been below {shown(self.best)} of {best} for {self.waited} scorings"
        return f"stopped early after step {step}: {reason}; {kept}"

    def state_dict(self):
        best = self.best if math.isfinite(self.best) else None
        return {"best": best, "best_step": self.best_step, "waited": self.waited, "pending": self.pending}

    def load_state_dict(self, state):
        self.best = -math.inf if state["best"] is None else state["best"]
        self.best_step, self.waited, self.pending = state["best_step"], state["waited"], state.get("pending")


def score_held_out(accelerator, heldout, stopping, draw, step):
    """Score the held-out reward, on all processes; the main one decides what follows.

    Args:
        heldout: `HeldOut`.
        stopping: `EarlyStopping`, of which that of the main process counts.
        draw: from `make_draw`.

    Returns:
        (figures {name: number}, whether they are the best so far, why to stop or `None`).
    """
    figures = heldout.measure(draw)
    decision = [stopping.update(step, figures["heldout_mean"]) if accelerator.is_main_process else None]
    return figures, *broadcast_object_list(decision)[0]


def load_base(args, dtype, families=FAMILIES):
    """The base model of the arguments, see `diffusion_models.load_model`.

    Raises:
        ValueError: naming the flag, if it cannot be loaded.
    """
    vae = None
    if getattr(args, "pretrained_vae_model_name_or_path", None) is not None:
        with naming("--pretrained_vae_model_name_or_path"):
            vae = load_vae(
                args.pretrained_vae_model_name_or_path, "AutoencoderKL", torch.float32, cache_dir=args.cache_dir
            )
    with naming("--pretrained_model_name_or_path"):
        model = load_model(
            args.pretrained_model_name_or_path,
            dtype=dtype,
            scheduler=getattr(args, "scheduler", None),
            vae=vae,
            quantize=args.quantize,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            families=families,
            before=partial(warn_before_loading, args),
        )
    check_family_flags(args, model)
    return model


# {flag: what it is where a family has no such option}
UNSET = {"sigmas": "native", "noise": "ddim", "final_noise": "auto", "guidance_scale_2": None}


def check_family_flags(args, model):
    """Give the model --max_sequence_length.

    Raises:
        ValueError: for flags of other families, for --eta if an evaluation is of a model that is drawn without noise, and
            for more tokens than its pipeline takes.
    """
    tokens, makes_videos = getattr(args, "max_sequence_length", None), isinstance(model, VideoModel)
    given = [name for name, unset in UNSET.items() if getattr(args, name, unset) != unset]
    others = [name for name in given if name not in model.sampling_options]
    others += ["max_sequence_length"] * (tokens is not None and not hasattr(model, "longest_sequence"))
    others += [name for name in ("num_frames", "fps") if not makes_videos and getattr(args, name, None) is not None]
    for name in others:
        raise ValueError(f"--{name} {getattr(args, name)} is for other models, not for a {model.pipeline_class}")
    is_without_noise = model.drawing_options({"eta": 1.0})["eta"] == 0
    if not hasattr(args, "noise") and args.eta != 1 and is_without_noise:  # an evaluation
        raise ValueError(f"--eta {args.eta} is not for a {model.pipeline_class}, which draws without noise")
    if tokens is not None:
        if tokens > model.longest_sequence:
            raise ValueError(
                f"--max_sequence_length {tokens}: a {model.pipeline_class} reads at most {model.longest_sequence}"
            )
        model.max_sequence_length = tokens
