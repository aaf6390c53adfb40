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
"""A seeded training loop that can be stopped at any moment and continues where it was."""

import os

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm


def best_device():
    """A GPU if there is one. Batches are drawn on the CPU, so that they are the same everywhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(model, loss, steps, learning_rate, seed, state_file, weight_decay=0.0, ema_decay=0.999, save_every=500):
    """Minimize `loss(generator) -> (loss, figures)` over the parameters of `model` with AdamW and one cycle of its rate.

    Progress goes to `state_file` every `save_every` steps. A later call with the same file continues there, or returns at
    once if that training had ended. Returns the exponential moving average of `model`.

    Raises:
        ValueError: `state_file` is of a training of another length.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.05)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    start = resume(state_file, parts, generator, steps)
    name = os.path.basename(state_file)
    bar = tqdm(range(start, steps), desc=name.partition(".")[0], initial=start, total=steps, mininterval=2)
    for step in bar:
        value, figures = loss(generator)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix({name: f"{figure:.4f}" for name, figure in figures.items()})
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(state_file, parts, generator, step + 1, steps)
    return average.module


def save(state_file, parts, generator, step, steps):
    """Write the state beside `state_file`, then move it into place: an interruption leaves the earlier one."""
    state = {name: part.state_dict() for name, part in parts.items()}
    os.makedirs(os.path.dirname(state_file), exist_ok=True)
    # Dropout draws from torch's own generator.
    random_state = {"generator": generator.get_state(), "dropout": torch.get_rng_state()}
    torch.save(state | random_state | {"step": step, "steps": steps}, f"{state_file}.new")
    os.replace(f"{state_file}.new", state_file)


def resume(state_file, parts, generator, steps):
    """Load what an earlier call saved; returns the step to continue with, 0 if there is none."""
    if not os.path.exists(state_file):
        return 0
    state = torch.load(state_file, weights_only=True)
    if state["steps"] != steps:
        raise ValueError(f"{state_file} is of a training of {state['steps']} steps, not {steps}: remove it")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    torch.set_rng_state(state["dropout"])
    return state["step"]
