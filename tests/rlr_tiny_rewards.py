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
"""Tiny checkpoints of all rewards, in the file layouts of the originals."""

import json
import os
import re
import shutil

import torch
from peft import LoraConfig, get_peft_model
from rlr_testing import TINY_AESTHETIC, TINY_CLIP
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SiglipConfig,
    SiglipModel,
)


# Key names of a transformers CLIPModel -> open_clip's, applied in this order: the inverse of reward_models/hpsv2.py.
OPEN_CLIP_NAMES = (
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def save_tiny_rewards(folder):
    """Create the checkpoints below `folder`. Returns `{reward: path}` for all rewards that have files."""
    paths = {"aesthetic": TINY_AESTHETIC, "clip_score": TINY_CLIP, "pickscore": TINY_CLIP}
    paths["video_smoothness"] = TINY_CLIP
    for name in ("hpsv2", "hpsv2.1", "imagereward"):
        (folder / name).mkdir()
        paths[name] = str(folder / name)
    save_hpsv2(folder / "hpsv2", "HPS_v2_compressed.pt")
    save_hpsv2(folder / "hpsv2.1", "HPS_v2.1_compressed.pt")
    save_imagereward(folder / "imagereward")
    for name, save in (("vqa", save_vqa), ("hpsv3", save_hpsv3), ("aesthetic_v2.5", save_aesthetic_v2_5)):
        (folder / name).mkdir()
        save(folder / name)
        paths[name] = str(folder / name)
    (folder / "videoalign").mkdir()
    save_videoalign(folder / "videoalign")
    paths |= {f"videoalign{suffix}": str(folder / "videoalign") for suffix in ("", "_vq", "_mq", "_ta")}
    return paths


def save_hpsv2(folder, file_name):
    """Save the CLIP of assets/tiny-aesthetic as an open_clip checkpoint, with its tokenizer."""
    state, projections = {}, {}
    for key, value in CLIPModel.from_pretrained(TINY_CLIP).state_dict().items():
        for old, new in OPEN_CLIP_NAMES:
            key = key.replace(old, new)
        if key in ("visual.proj", "text_projection"):
            value = value.T
        match = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", key)
        if match:
            projections.setdefault(f"{match[1]}in_proj_{match[3]}", {})[match[2]] = value
        else:
            state[key] = value
    state.update({key: torch.cat([parts[x] for x in "qkv"]) for key, parts in projections.items()})
    vision = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 4}
    text = {"context_length": 16, "vocab_size": 566, "width": 64, "heads": 4, "layers": 2}
    model = {"embed_dim": 768, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(TINY_CLIP, file), folder)
    torch.save({"epoch": 1, "state_dict": state}, folder / file_name)


def split_tokenizer(folder):
    """Replace a CLIP's tokenizer.json by vocab.json and merges.txt, the layout of the published files."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))


def save_imagereward(folder):
    """Save a tiny random ImageReward. Returns its vision model, text model, and the weights and biases of its head."""
    torch.manual_seed(0)  # module fixtures run before conftest.py seeds the test
    vit = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = {**sizes, "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"##{letter}" for letter in vocabulary[5:]]
    bert["vocab_size"] = len(vocabulary)
    vision = BlipVisionModel(
        BlipVisionConfig(**vit, intermediate_size=128, layer_norm_eps=1e-6, initializer_range=0.2)
    )
    config = BlipTextConfig(**bert, encoder_hidden_size=32, is_decoder=True, bos_token_id=None, initializer_range=0.2)
    text = BlipTextModel(config, add_pooling_layer=False)
    head = {}
    for layer, (rows, columns) in zip((0, 2, 4, 6, 7), ((1024, 24), (128, 1024), (64, 128), (16, 64), (1, 16))):
        head[f"mlp.layers.{layer}.weight"] = torch.randn(rows, columns) / columns**0.5
        head[f"mlp.layers.{layer}.bias"] = torch.randn(rows) / 10
    state = {f"blip.text_encoder.{key}": value for key, value in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    # Key names of transformers' vision tower -> BLIP's, applied in this order.
    names = (
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("post_layernorm", "norm"),
        ("encoder.layers", "blocks"),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn", "attn"),
    )
    for key, value in vision.state_dict().items():
        for old, new in names:
            key = key.replace(old, new)
        state[f"blip.visual_encoder.{key}"] = value
    torch.save({**state, **head, "blip.text_proj.weight": torch.zeros(4, 24)}, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({**bert, "encoder_width": 768}))
    (folder / "vit_config.json").write_text(json.dumps(vit))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    return vision.eval(), text.eval(), list(head.values())


VIDEOALIGN = {
    "data_config": {
        "max_frame_pixels": 448 * 448,
        "num_frames": None,
        "fps": 2.0,
        "sample_type": "uniform",
        "prompt_template_type": "detailed_special",
    },
    "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "output_dim": 3, "use_special_tokens": True},
    "peft_lora_config": {"lora_r": 4, "lora_alpha": 8, "use_rslora": False},
    "inference_config": {
        **{"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 0.5},
        **{"TA_mean": 1.0, "TA_std": 4.0},
    },
}
TEMPLATE = """
Rate its looks <|VQ_reward|>
and its motion <|MQ_reward|>
and whether it shows - {text_prompt}: <|TA_reward|>
"""


def byte_tokenizer(special):
    """A Qwen2Tokenizer of single bytes and special tokens, and its vocabulary."""
    vocabulary = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer, vocabulary


def qwen_parts():
    """The tokenizer of a tiny Qwen2-VL, and what its configurations share."""
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer, vocabulary = byte_tokenizer([*special, "<|image_pad|>", "<|video_pad|>"])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 9, "max_position_embeddings": 1024}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    ids = {
        **{"image_token_id": vocabulary["<|image_pad|>"], "video_token_id": vocabulary["<|video_pad|>"]},
        "vision_start_token_id": vocabulary["<|vision_start|>"],
        "vision_end_token_id": vocabulary["<|vision_end|>"],
    }
    return tokenizer, {"text_config": {**text, "initializer_range": 0.2}, **ids, "tie_word_embeddings": True}


def tiny_qwen2_vl():
    """A tiny random Qwen2-VL, with more embeddings than tokens as the published one, and its tokenizer."""
    tokenizer, shared = qwen_parts()
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4}
    config = Qwen2VLConfig(vision_config={**vision, "initializer_range": 0.2}, **shared)
    return Qwen2VLForConditionalGeneration(config).eval(), tokenizer


INSTRUCTION, REQUEST = "Rate it, {{}} or not.\nprompt - {text_prompt}\n", "\nThe rating: <|Reward|>\n\nEND\n"


def save_hpsv3(folder):
    """Save a tiny random HPSv3 in the layout of the original, with key names of transformers 4.

    Returns:
        The network, its head, and the tokenizer.
    """
    model, tokenizer = tiny_qwen2_vl()
    model.config.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_tokens(["<|Reward|>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = [torch.nn.Linear(*sizes) for sizes in ((16, 1024), (1024, 16), (16, 2))]
    state = {key.replace("model.language_model.", "model."): value for key, value in model.state_dict().items()}
    state = {re.sub(r"^model\.visual\.", "visual.", key): value.clone() for key, value in state.items()}
    for place, layer in zip((0, 3, 5), layers):
        state |= {f"rm_head.{place}.{key}": value for key, value in layer.state_dict().items()}
    save_file(state, folder / "HPSv3.safetensors")
    code = f"raise SystemExit\nINSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {REQUEST!r}\n"
    (folder / "data_collator_qwen.py").write_text(code)
    return model.requires_grad_(False), layers, tokenizer


def save_aesthetic_v2_5(folder):
    """Save a tiny random SigLIP, and a head in the layout of the original; returns the SigLIP and the head's layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config={**sizes, "vocab_size": 50})).eval()
    model.save_pretrained(folder / "siglip")
    widths = (16, 1024, 128, 64, 16, 1)
    layers = [torch.nn.Linear(*pair) for pair in zip(widths, widths[1:])]
    state = {
        f"scoring_head.{2 * i}.{key}": v for i, layer in enumerate(layers) for key, v in layer.state_dict().items()
    }
    torch.save(state, folder / "aesthetic_predictor_v2_5.pth")
    return model.requires_grad_(False), layers


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_vqa(folder):
    """Save a tiny random Qwen2.5-VL in the layout of the Hub, without what its videos need."""
    tokenizer, shared = qwen_parts()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    vision = {"depth": 2, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1], "initializer_range": 0.2}
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **shared)).save_pretrained(folder)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    Qwen2VLImageProcessorPil(patch_size=4, size=size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_llava(folder):
    """Save a tiny random LLaVA in the layout of the Hub."""
    torch.manual_seed(0)
    tokenizer, vocabulary = byte_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("IMAGE", "<image>\n")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
        text_config={**sizes, "model_type": "llama", "vocab_size": len(tokenizer) + 5, "initializer_range": 0.2},
        image_token_id=vocabulary["<image>"],
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def old_name(key):
    """The name of a weight in a checkpoint of transformers 4."""
    return key.replace("model.model.language_model.", "model.model.").replace("model.model.visual.", "model.visual.")


def save_videoalign(folder, full=False):
    """Save a tiny random VideoReward in the layout of the original's trainer.

    Args:
        full: whether the checkpoint has all weights, or only those that were trained.

    Returns:
        The peft model, with a linear `rm_head`, and the tokenizer.
    """
    model, tokenizer = tiny_qwen2_vl()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tokenizer.add_tokens([f"<|{name}_reward|>" for name in ("VQ", "MQ", "TA")], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.rm_head = torch.nn.Linear(16, 3, bias=False)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    linear = [name for name in linear if "language_model" in name]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=linear)).eval()
    trained = {key for key, _ in model.named_parameters() if "layers" not in key or "lora" in key}
    for key, parameter in model.named_parameters():
        if key in trained:
            parameter.data += 0.1 * torch.randn_like(parameter)
    state = {old_name(key): value.detach().clone() for key, value in model.state_dict().items()}
    checkpoint = folder / "checkpoint-20"
    (folder / "checkpoint-3").mkdir()  # older, and empty
    checkpoint.mkdir()
    if full:
        torch.save(state, checkpoint / "model.pth")
    else:
        lora = {key.replace(".default", ""): value for key, value in state.items() if "lora" in key}
        save_file(lora, checkpoint / "adapter_model.safetensors")
        trained = {old_name(key) for key in trained if "lora" not in key}
        torch.save({key: state[key] for key in trained}, checkpoint / "non_lora_state_dict.pth")
    (folder / "model_config.json").write_text(json.dumps(VIDEOALIGN))
    template = f'DETAILED_PROMPT_WITH_SPECIAL_TOKEN = """{TEMPLATE}"""'
    (folder / "prompt_template.py").write_text(f"raise SystemExit\n{template}\n")
    return model.requires_grad_(False), tokenizer
