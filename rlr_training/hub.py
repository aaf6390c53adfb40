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
"""The Hub: the repository of a run, its model card, and the upload."""

import os
import re
import shlex
from importlib.metadata import version

from accelerate.logging import get_logger
from diffusion_models.adapters import files_of
from diffusion_models.lora_files import SECOND
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from reward_models import parse_reward
from reward_models.loading import first_line

from .chains import kind_of, sampling_options, size_of
from .checkpoints import is_address
from .display import rows_of, scores_shown, shortened, with_error
from .prompts import levels_of


logger = get_logger(__name__, log_level="INFO")

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")
NOT_UPLOADED = ("checkpoint-*", "partial-*")
# What a command in a card leaves out: secrets, a folder of this machine, and what would make it another run's.
NOT_SHOWN = ("hub_token", "cache_dir", "resume_from_checkpoint", "overwrite_output_dir")
# Flags whose values are texts and no names of files.
TEXTS = ("negative_prompt", "validation_prompts")
# Flags that are given once for each value.
REPEATED = ("reward_path", "reward_option", "reward_floor")
# The flags of training that mean the same to evaluate_rlr.py.
EVALUATION_FLAGS = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "revision", "variant", "cache_dir"),
    *(
        "reward",
        "reward_path",
        "reward_option",
        "feature_model",
        "prompts",
        "dcot_boundaries",
        "resolution",
        "height",
        "width",
    ),
    *("num_frames", "fps", "frame_reduction", "guidance_scale_2"),
    *("scheduler", "num_inference_steps", "guidance_scale", "negative_prompt", "eta", "sigmas", "max_sequence_length"),
    *("mixed_precision", "quantize"),
)


def license_of(model, token):
    """The license that a model's card states, or `None`."""
    card = os.path.join(model, "README.md") if os.path.isdir(model) else model
    # Weights in a single file have no card, and the path of a missing card would be taken for the name of a repository.
    if os.path.isfile(model) or card != model and not os.path.isfile(card):
        return None
    try:
        return ModelCard.load(card, token=token).data.license
    except Exception as error:  # a card is not needed: there may be none, or no Hub to ask
        logger.info(f"no license is known for {model!r}: {first_line(error)}")
        return None


def create_repository(args):
    """The name of the repository of --push_to_hub, which is created if need be, or `None`.

    Raises:
        ValueError: if it cannot be created.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    try:
        return create_repo(name, exist_ok=True, token=args.hub_token).repo_id
    except Exception as error:  # the client lets the errors of its HTTP library through
        raise ValueError(f"--push_to_hub: cannot create {name!r} on the Hub: {error}") from error


def push(args, repo_id, message):
    """Upload the output folder.

    Raises:
        ValueError: one line with the command that does it later.
    """
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message=message,
            ignore_patterns=list(NOT_UPLOADED),
            token=args.hub_token,
        )
    except Exception as error:  # the client lets the errors of its HTTP library through
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_UPLOADED)
        raise ValueError(
            f"--push_to_hub: the upload to {repo_id!r} has failed ({first_line(error)}); everything is in"
            f" {args.output_dir!r}, to upload it later: hf upload {repo_id} {shlex.quote(args.output_dir)} . {excluded}"
        ) from error


def typed_flags(args, defaults):
    """{name: value} of the flags that a command line has set.

    Args:
        args: of the script, before what they leave open is set.
        defaults: the arguments of the script without any flag.
    """
    return {name: value for name, value in vars(args).items() if value != getattr(defaults, name)}


def flag_words(name, value):
    """The words of a command line that set a flag, such as ["--eta", "0.5"]."""
    if value is True:
        return [f"--{name}"]
    if name in REPEATED:
        return [word for entry in value for word in (f"--{name}", entry)]
    values = [str(one) for one in (value if isinstance(value, list) else [value])]
    if len(values) == 1 and values[0].startswith("-"):  # would be taken for a flag
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def without_folders(text):
    """A name, or names with commas or equals signs between them, in which absolute paths are cut to their last part."""
    parts = re.split(r"([,=]\s*)", text.strip())
    return "".join(os.path.basename(os.path.normpath(part)) if os.path.isabs(part) else part for part in parts)


def command_of(args, flags, accelerator, script):
    """The command that starts the same run, without what is of this machine only.

    Args:
        args: of the script.
        flags: from `typed_flags`.
    """
    words = ["accelerate", "launch", "--num_processes", str(accelerator.num_processes)]
    if accelerator.mixed_precision != "no" and "mixed_precision" not in flags:  # from accelerate's configuration
        words += ["--mixed_precision", accelerator.mixed_precision]
    words.append(script)
    # These two say what a run is, also where they are the defaults.
    flags = {"reward": args.reward, "gradient_estimator": args.gradient_estimator, **flags}
    for name, value in without_addresses(flags).items():
        if name not in NOT_SHOWN:
            shown = flag_words(name, value)
            words += shown if name in TEXTS else map(without_folders, shown)
    return shlex.join(words)


def without_addresses(values):
    """{flag: value}, in which --reward_option says nothing of the machines of a network, nor what an own reward is told."""
    options = []
    for entry in values.get("reward_option") or []:
        name = entry.partition("=")[0]
        options.append(f"{name}=..." if is_address(entry) or ":" in name else entry)
    return {**values, "reward_option": options} if options else values


def settings_shown(settings):
    """{name: text} of what is set, without secrets and folders of this machine, from {name: value}."""
    found = {}
    for name, value in without_addresses(settings).items():
        if name not in NOT_SHOWN and value not in (None, False, []):
            texts = map(str, value if isinstance(value, (list, tuple)) else [value])
            found[name] = " ".join(texts if name in TEXTS else map(without_folders, texts))
    return found


def versions_shown():
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def evaluation_command_of(args, flags):
    """The command that compares the adapter of a run with the base model.

    Args:
        args: of the script.
        flags: from `typed_flags`.
    """
    output_dir, flags = args.output_dir, {**flags, EVALUATION_FLAGS[0]: args.pretrained_model_name_or_path}
    trained, held = parse_reward(args.reward), parse_reward(args.heldout_reward) if args.heldout_reward else {}
    # The defaults of the two scripts differ. A held-out reward is scored beside the trained one.
    others = [part for part, name in zip((args.heldout_reward or "").split(","), held) if name not in trained]
    flags["reward"] = ",".join([args.reward, *others])
    words = ["python", "evaluate_rlr.py", "--adapters", output_dir]
    if hasattr(args, "noise"):  # a flow-matching model, which is drawn without noise
        flags.pop("eta", None)
    for name in EVALUATION_FLAGS:
        words += flag_words(name, flags[name]) if name in flags else []
    return shlex.join([*words, "--output_dir", f"{os.path.normpath(output_dir)}-evaluation"])


def save_model_card(args, model, prompt, repo_id, base_license, command, step, results=None):
    """Write README.md into the output folder: what the adapter is, how to use it, and the scores if there are any.

    Args:
        model: `DiffusionModel`.
        prompt: of the example.
        repo_id: from `create_repository`, or `None`.
        base_license: from `license_of`, or `None`.
        command: from `command_of`.
        step: how many optimizer steps were taken.
        results: from `evaluation.compare_with_base`.
    """
    local = os.path.exists(args.pretrained_model_name_or_path)
    data = ModelCardData(
        base_model=None if local else args.pretrained_model_name_or_path,
        library_name="diffusers",
        license=base_license,
        tags=[model.name, f"{model.name}-diffusers", f"text-to-{kind_of(args)}", "diffusers", "lora", "rlr"],
        inference=True,
    )
    source, reward = repo_id or without_folders(args.output_dir), without_folders(args.reward)
    text = f"""
# LoRA fine-tuned with RLR - {source}

LoRA weights for `{without_folders(args.pretrained_model_name_or_path)}`, trained to raise the reward `{reward}` with the
`{args.gradient_estimator}` estimator of RLR (https://huggingface.co/papers/2502.00639); {step} optimizer steps.

{_example(args, model, source, prompt)}"""
    if levels_of(args.prompts, [prompt]) is not None:
        text += f"""
It was trained, and its {kind_of(args)}s below are drawn, with a coarse, a middle and a fine prompt one after the other, which
change after {args.dcot_boundaries[0]} and {args.dcot_boundaries[1]} of the steps.
"""
    if results is not None:
        text += _table_of(kind_of(args), reward, without_folders(args.heldout_reward or ""), results)
    text += f"""
## How it was trained

![reward by optimizer step](./reward_curve.png)

```bash
{command}
```

Seed {args.seed}; {versions_shown()}. `metrics.jsonl` has the figures of every step, `training_args.json` all arguments.
"""
    if base_license is None:
        text += "\nThe license of the base model applies to what is derived from it. It is not known to this card.\n"
    else:
        text += f"\nThe license is the base model's: {base_license}.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(os.path.join(args.output_dir, "README.md"))


def _example(args, model, source, prompt):
    """Python that draws an image with the adapter."""
    loaded, classes, lines = repr(without_folders(args.pretrained_model_name_or_path)), {model.pipeline_class}, ""
    if getattr(args, "pretrained_vae_model_name_or_path", None) is not None:
        loaded += f", vae=AutoencoderKL.from_pretrained({without_folders(args.pretrained_vae_model_name_or_path)!r})"
        classes.add("AutoencoderKL")
    loaded += "".join(f", {name}=None" for name in model.missing)
    scheduler = model.scheduler_code(getattr(args, "scheduler", None))
    if scheduler is not None:
        name, settings = scheduler
        settings = "".join(f", {key}={value!r}" for key, value in settings.items())
        lines = f"pipeline.scheduler = {name}.from_config(pipeline.scheduler.config{settings})\n"
        classes.add(name)
    loader = "from_single_file" if os.path.isfile(args.pretrained_model_name_or_path) else "from_pretrained"
    options = model.drawing_options(sampling_options(args, model))
    size, guidance = size_of(args), (args.guidance_scale, args.negative_prompt)
    arguments = model.pipeline_arguments(size, args.num_inference_steps, *guidance, **options)
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    result, saving, imports = "image = ", ".images[0]", ""
    if kind_of(args) == "video":
        given += ", output_type='pil'"
        result, saving = "video = ", f".frames[0]\nexport_to_gif(video, 'video.gif', fps={args.fps:g})"
        imports = "\nfrom diffusers.utils import export_to_gif"
    for component, name in files_of(model).items():
        option = ", load_into_transformer_2=True" if component == SECOND else ""
        lines += f"pipeline.load_lora_weights({source!r}, weight_name={name!r}{option})\n"
    return f"""```py
from diffusers import {", ".join(sorted(classes))}{imports}

pipeline = {model.pipeline_class}.{loader}({loaded})
{lines}{result}pipeline(
    prompt={shortened(prompt)!r}, {given}
){saving}
```
"""


def _table_of(kind, reward, heldout, results):
    """The scores of base and tuned model, as Markdown."""
    rows = rows_of(results, reward, heldout)
    if len(results["members"]) > 1:
        rows |= results["members"]
    text = "\n| reward | base | tuned | gain |\n|---|---|---|---|\n"
    for name, row in rows.items():
        cells = (scores_shown(row[model], results["num_images"]) for model in ("base", "tuned"))
        cells = [f"{mean} (deviation {deviation})" for mean, deviation in cells]
        cells.append(with_error(row["gain"]["mean"], row["gain"]["standard_error"], "+"))
        text += f"| `{without_folders(name)}` | {' | '.join(cells)} |\n"
    return (
        text
        + f"""
Over {results["num_images"]} {kind}s of fixed seeds; the gain with its standard error. Some of them, base above tuned:

![base above tuned](./before_after.{"gif" if kind == "video" else "png"})
"""
    )
