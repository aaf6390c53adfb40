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
"""Images of fixed seeds, shared out among the processes, so that none waits for another."""

import torch


class Share:
    """Which of N images a process draws: equally many in each, in a row.

    Where N is no multiple of the number of processes, the last ones draw some that another one draws, too.

    Args:
        accelerator: accelerate's.
        count: N >= 1.

    Attributes:
        first: number of the first.
        size: how many they are.
    """

    def __init__(self, accelerator, count):
        self.accelerator, self.count = accelerator, count
        self.size = -(-count // accelerator.num_processes)
        self.first = self._first_of(accelerator.process_index)

    def _first_of(self, process):
        return min(process * self.size, self.count - self.size)

    def of(self, items):
        """Those of N items that belong to this process."""
        return items[self.first : self.first + self.size]

    def in_order(self, parts):
        """Tensors (size, ...) of each process -> (N, ...)."""
        processes = [i // self.size for i in range(self.count)]
        return torch.cat(parts)[[p * self.size + i - self._first_of(p) for i, p in enumerate(processes)]]

    def gathered(self, values):
        """A tensor (size, ...) of this process, and those of the others -> (N, ...) on the CPU, in all of them."""
        if self.accelerator.num_processes > 1:
            values = self.accelerator.gather(values.to(self.accelerator.device))
        return self.in_order(values.cpu().split(self.size))
