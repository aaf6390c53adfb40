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
"""The flags that training scripts share, in groups; a script adds those of its own models."""

from .flags import BETA, NOT_NEGATIVE, OF_FAMILY, POSITIVE, number_or_auto, whole_number, whole_or_auto


ESTIMATORS = ("rlr", "rlr_paper", "full_bp", "truncated_bp", "draft_lv", "alignprop", "ddpo")
BASELINES = ("auto", "none", "leave_one_out", "per_prompt", "predicted_x0")
# The learning-rate schedules of diffusers that need no further arguments.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# What --preset_low_memory sets where the command says nothing else: one image at a time, and little on the device that is
# not in use.
LOW_MEMORY = {
    "train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "decode_batch_size": 1,
    "reward_offload": True,
    "mixed_precision": "bf16",
}


def add_model_flags(parser, default, files="", lora_layers=None):
    """The pipeline to train and its LoRA; returns the group, for the flags that a family adds.

    Args:
        default: name of the pipeline.
        files: what else the pipeline may be, as its help says.
        lora_layers: default of the flag.
    """
    group = parser.add_argument_group("model")
    add = group.add_argument
    add(
        "--pretrained_model_name_or_path",
        default=default,
        help=f"Folder of a diffusers pipeline, or its name on huggingface.co/models{files}.",
    )
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model files, such as fp16.")
    add("--cache_dir", help="Folder for downloaded models and datasets.")
    add(
        "--quantize",
        choices=["nf4", "int8", "fp8"],
        help="Hold the frozen weights of the network in four bits (bitsandbytes, needs a GPU) or in eight (torchao). The LoRA"
        " is trained in float32 all the same.",
    )
    add(
        "--adapter_path",
        help="Train this LoRA further (folder, file or Hub name), with its rank, scale and layers.",
    )
    add("--rank", type=whole_number(), default=4, help="Rank of the LoRA.")
    add("--lora_alpha", type=whole_number(), help="The LoRA update is scaled by lora_alpha / rank. Default: the rank.")
    add(
        "--lora_layers",
        default=lora_layers,
        help="Names of the layers that get a LoRA, with commas." + (OF_FAMILY if lora_layers is None else ""),
    )
    return group


def add_estimator_flags(parser):
    """How the gradient is estimated; see docs/estimators.md."""
    add = parser.add_argument_group("gradient estimator").add_argument
    add("--gradient_estimator", default="rlr", choices=ESTIMATORS, help="The gradient estimator.")
    add(
        "--mixing",
        type=number_or_auto,
        default="auto",
        help="For rlr: the share of the pathwise gradient at all steps but the last, from 0 (likelihood ratio only) to 1"
        " (backpropagation only), or auto for the share of least variance.",
    )
    add("--truncation_steps", type=whole_number(), default=1, help="For truncated_bp: the last K steps.")
    add("--lv_samples", type=whole_number(), default=2, help="For draft_lv: re-noisings of each image.")
    add(
        "--branches",
        type=whole_number(0),
        default=0,
        help="For rlr with a black box: compare this many pairs of branches at one random step of each image instead of"
        " sweeping all steps.",
    )
    add(
        "--baseline",
        default="auto",
        choices=BASELINES,
        help="What an image's reward is compared with: nothing, the other images of the optimizer step, those of the same"
        " prompt, or the reward of the image predicted at each step, which costs a decoding and a scoring. auto:"
        " predicted_x0 where it pays (all steps of rlr with a black box, none with a smooth reward), else leave_one_out.",
    )
    add(
        "--baseline_vae",
        help="An AutoencoderTiny (folder or Hub name, such as madebyollin/taesd, or taesdxl for SDXL) that decodes the"
        " predicted images. Default: the pipeline's own decoder.",
    )
    add(
        "--sweep_fraction",
        type=number_or_auto,
        default="auto",
        help="The share of the steps, other than the last three, that is differentiated. The steps are drawn at random and"
        " weighted, so the gradient stays unbiased; it is cheaper and noisier. auto: .5 for rlr with a smooth reward,"
        " else 1.",
    )
    add("--ppo_clip_range", type=POSITIVE, default=0.2, help="For ddpo: clipping of the ratio.")
    add(
        "--num_inner_epochs",
        type=whole_number(),
        default=1,
        help="For ddpo: optimizer steps on each batch of images. More than one needs --mixed_precision no.",
    )


def add_paper_flags(parser):
    """The paper's own composition of estimators, for comparison; see docs/estimators.md."""
    add = parser.add_argument_group("estimator rlr_paper").add_argument
    add(
        "--subchain_length",
        type=whole_number(0),
        default=2,
        help="Steps of the half-order sub-chain; 0 for none.",
    )
    add(
        "--subchain_range",
        type=int,
        nargs=2,
        metavar=("A", "B"),
        help="The sub-chain starts at a step from A to B, counted from the last. Default: anywhere.",
    )
    add(
        "--rest",
        default="zeroth_order",
        choices=["zeroth_order", "likelihood_ratio", "none"],
        help="What the other steps take; none is biased.",
    )


def add_prompt_flags(parser, boundaries):
    """Where the prompts come from."""
    add = parser.add_argument_group("prompts").add_argument
    add(
        "--prompts",
        help="simple_animals or activities, a text file with one prompt a line, or a JSON or JSONL file of objects"
        ' with a "prompt", and for a chain of thought "coarse", "mid" and "fine". "a {red|blue} cat" stands for two prompts.'
        " Default: simple_animals.",
    )
    add("--dataset_name", help="Take the prompts from this dataset: Hub name, file or folder, also of save_to_disk.")
    add("--dataset_config_name", help="Configuration of the dataset.")
    add("--dataset_split", default="train", help="Split of the dataset.")
    add("--dataset_streaming", action="store_true", help="Read the captions without downloading the dataset.")
    add("--caption_column", default="text", help="Column of the dataset with the prompts.")
    add("--max_prompts", type=whole_number(), help="Use the first so many prompts only.")
    add("--images_per_prompt", type=whole_number(), default=1, help="Images of a prompt in a row, for per_prompt.")
    add(
        "--dcot_boundaries",
        type=float,
        nargs=2,
        default=list(boundaries),
        metavar=("A", "B"),
        help="Shares of the chain after which the mid and the fine prompt take over in a chain of thought.",
    )


def add_validation_flags(parser):
    """Images that people look at."""
    add = parser.add_argument_group("validation").add_argument
    add(
        "--validation_prompts",
        nargs="+",
        help="Prompts of the images for validation/, and of the held-out images and the comparison at the end, instead of those that"
        " are trained on.",
    )
    add("--num_validation_images", type=whole_number(), default=4, help="Images per validation prompt.")
    add("--validation_steps", type=whole_number(), default=100, help="Validate every so many optimizer steps.")
    add(
        "--num_eval_images",
        type=whole_number(0),
        default=64,
        help="Images of fixed seeds on which base and tuned model are compared at the end; 0 for no comparison.",
    )


def add_training_flags(parser, output_dir):
    """The optimizer, and how much is on the device at a time."""
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default=output_dir, help="Folder for everything that is written.")
    add("--seed", type=whole_number(0), help="Seed of everything that is random. Default: a random one.")
    add("--train_batch_size", type=whole_number(), default=4, help="Images per forward pass and device.")
    add("--gradient_accumulation_steps", type=whole_number(), default=1, help="Batches per optimizer step.")
    add("--num_train_epochs", type=whole_number(), default=100, help="Passes over the prompts.")
    add("--max_train_steps", type=whole_number(), help="Optimizer steps; overrides --num_train_epochs.")
    add(
        "--preset_low_memory",
        action="store_true",
        help="For small cards; where not given otherwise, sets "
        + " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in LOW_MEMORY.items())
        + ".",
    )
    add(
        "--gradient_checkpointing",
        nargs="?",
        const="on",
        default="auto",
        choices=["on", "off", "auto"],
        help="Checkpoint the blocks of the network: far less memory, a sweep slower by a third. The decoder always is. auto: on"
        " a GPU if a batch does not fit otherwise.",
    )
    add(
        "--guidance_batching",
        default="auto",
        choices=["joint", "split", "auto"],
        help="Call the network once for both halves of guidance, or twice: half the memory of a swept step, which is slower by a"
        " fifth. auto: on a GPU split if a batch does not fit otherwise, before --gradient_checkpointing.",
    )
    add("--vae_offload", action="store_true", help="Keep the VAE on the CPU except while it decodes.")
    add(
        "--offload_blocks",
        action="store_true",
        help="Keep the frozen weights of the network's blocks on the CPU except while each of them computes. Needs"
        " --gradient_checkpointing, which it sets.",
    )
    add(
        "--keep_graphs",
        type=whole_or_auto(0),
        default="auto",
        help="Keep the network's graphs of the last so many denoising steps instead of computing them again: faster, for"
        " the memory of as many more steps of all images of an optimizer step on a device. auto: on a GPU as many as fit into"
        " what the first step has left free, else 0.",
    )
    add("--compile", action="store_true", help="Compile the blocks that the network repeats with torch.compile.")
    add(
        "--cuda_graphs",
        action="store_true",
        help="Launch each call of the network at once, as a CUDA graph: up to six times faster where the CPU is the brake, as"
        " with few images on a fast GPU. The memory of one call's graph stays taken.",
    )
    add(
        "--shard",
        action="store_true",
        help="Leave each of several processes a part of the network's frozen weights, which they gather block by block at"
        " each call: for networks that are too large for one GPU.",
    )
    add("--learning_rate", type=POSITIVE, default=1e-4, help="Learning rate after warm-up.")
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the images per optimizer step.")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="Schedule of the learning rate.")
    add("--lr_warmup_steps", type=whole_number(0), default=0, help="Warm-up steps of the schedule.")
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes with 8-bit states.")
    add("--adam_beta1", type=BETA, default=0.9, help="AdamW beta1.")
    add("--adam_beta2", type=BETA, default=0.999, help="AdamW beta2.")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="AdamW weight decay.")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="AdamW epsilon.")
    add(
        "--max_grad_norm",
        type=number_or_auto,
        default="auto",
        help="Clip gradients to this norm. auto: divide them by the median norm of the last 20 steps, so that the unit of the"
        " reward does not matter, and clip outliers; see docs/training.md.",
    )
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's configuration.")
    add("--allow_tf32", action="store_true", help="Allow TF32 matrix products on Ampere and later.")


def add_saving_flags(parser):
    """Checkpoints, trackers, Hub; returns the group, for the flags that a family adds."""
    group = parser.add_argument_group("checkpoints, trackers, Hub")
    add = group.add_argument
    add("--checkpointing_steps", type=whole_number(), default=500, help="Save a checkpoint every so many steps.")
    add("--checkpoints_total_limit", type=whole_number(), help="Keep at most so many checkpoints.")
    add(
        "--resume_from_checkpoint",
        help="A checkpoint-N of the output folder, the path of one, or latest, which starts afresh if there is none.",
    )
    add(
        "--overwrite_output_dir",
        action="store_true",
        help="Remove an earlier run from the output folder, its checkpoints too, and start afresh.",
    )
    add("--logging_dir", default="logs", help="Folder of the trackers in the output folder.")
    add(
        "--report_to",
        default="tensorboard",
        choices=["tensorboard", "wandb", "comet_ml", "all", "none"],
        help="Where the metrics go besides metrics.jsonl.",
    )
    add("--push_to_hub", action="store_true", help="Upload the result to the Hub.")
    add("--push_every", type=whole_number(), help="With --push_to_hub, also upload the adapter every so many steps.")
    add(
        "--hub_token",
        help="Token for the upload. Launchers print the command of a run that fails, so prefer `hf auth login` or the"
        " environment variable HF_TOKEN.",
    )
    add("--hub_model_id", help="Repository on the Hub. Default: the output folder's name.")
    return group


def parse_training_args(parser, input_args):
    """The arguments, with what --preset_low_memory sets; bad ones end the program with one line."""
    args = parser.parse_args(input_args)
    if args.preset_low_memory:
        parser.set_defaults(**LOW_MEMORY)
        args = parser.parse_args(input_args)
    del args.preset_low_memory  # the run is what it stands for
    if args.offload_blocks:  # graphs that are kept would hold the weights
        _set_where_auto(args, gradient_checkpointing="on", keep_graphs=0)
    # CUDA graphs overwrite their activations at each call. Ranks that share a network cannot each see what fits: one that
    # runs out of memory within a call would leave the others waiting.
    if args.cuda_graphs or args.shard:
        _set_where_auto(args, gradient_checkpointing="off", guidance_batching="joint", keep_graphs=0)
    from .checks import check_args

    try:
        check_args(args, parser.get_default)
    except ValueError as error:
        parser.error(str(error))
    return args


def _set_where_auto(args, **values):
    for name, value in values.items():
        if getattr(args, name) == "auto":
            setattr(args, name, value)
