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
"""How many steps keep their graphs for the sweep: as many as memory holds that would lie idle."""

import torch


MARGIN = 0.1  # of a device's memory, which is left free


class KeptGraphs:
    """Of how many of the last steps a rollout keeps the graphs.

    With "auto" they are none in the first optimizer step, and then as many as fit into what its peak has left free, on a GPU.
    If memory runs out all the same, they are none from then on, and the rollout is repeated.

    Args:
        setting: a number of steps or "auto".
        num_steps: T.

    Attributes:
        steps: how many they are.
    """

    def __init__(self, setting, num_steps):
        self.is_auto = self.is_open = setting == "auto"
        self.num_steps, self.steps = num_steps, 0 if self.is_auto else setting
        self.trajectories = []

    def begin(self, x):
        """To be called before the first rollout of an optimizer step, which starts from latents x (B, ...)."""
        self.trajectories = []
        if self.is_open and x.is_cuda:
            torch.cuda.reset_peak_memory_stats(x.device)

    def rolled_out(self, run, generator, x):
        """run() -> `Batch`, or run() again without any kept graphs if memory runs out.

        Args:
            generator: that `run` draws from, as in `rollout`.
            x: latents (B, ...) on the device of the rollout.
        """
        if not (self.is_auto and self.steps):
            return run()
        generators = _generators_of(generator, x)
        states = [one.get_state() for one in generators]
        try:
            batch = run()
            self.trajectories.append(batch.trajectory)
            return batch
        except torch.OutOfMemoryError:
            self.steps = 0
        for trajectory in self.trajectories:
            trajectory.kept.clear()
        for one, state in zip(generators, states):
            one.set_state(state)
        return run()

    def settle(self, batches):
        """With "auto", to be called after the first sweep of an optimizer step of such batches."""
        if self.is_open:
            self.is_open = False
            self.steps = min(self.num_steps, _graphs_that_fit(batches[-1], len(batches)))


def _generators_of(generator, x):
    """The generators behind an argument of `rollout`."""
    if isinstance(generator, (list, tuple)):
        return list(generator)
    if generator is not None:
        return [generator]
    return [torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator]


def _graphs_that_fit(batch, num_batches):
    """How many steps' graphs of such batches fit into memory that was free at the peak since `KeptGraphs.begin`."""
    spare, size = spare_bytes(batch.x_0.device), graph_bytes(batch.chain, batch.trajectory)
    return max(0, int(spare // (num_batches * size))) if size > 0 else 0


def spare_bytes(device):
    """Bytes of a GPU that were free at the peak, but for `MARGIN`; 0 on other devices."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device) - MARGIN * total


def graph_bytes(chain, trajectory):
    """Bytes that the graph of a step takes on a GPU; 0 on other devices."""
    device = trajectory.latents[1].device
    if device.type != "cuda":
        return 0
    before = torch.cuda.memory_allocated(device)
    with torch.enable_grad():
        kept = chain.mean(1, trajectory.latents[1].detach().requires_grad_())
    size = torch.cuda.memory_allocated(device) - before
    del kept
    return size
