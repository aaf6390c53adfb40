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
"""Rewards of one's own, named on the command line: `package.module:callable` or `path/to/file.py:callable`."""

import importlib
import importlib.util
import logging
import os
import sys
import traceback

import torch

from .base import problem_of


logger = logging.getLogger(__name__)


class CustomReward(torch.nn.Module):
    """A callable `(images, prompts) -> (B,)` together with whether its scores have a gradient.

    Raises:
        ValueError: naming it, for whatever it raises itself.
    """

    def __init__(self, name, function, differentiable):
        super().__init__()
        self.name = name
        self.function = function
        self.differentiable = differentiable

    def forward(self, images, prompts):
        try:
            # A copy where autograd does not watch: what is written into it would reach the other rewards.
            return self.function(images if images.requires_grad else images.clone(), prompts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the callable is the user's, and may raise anything
            raise ValueError(f"reward {self.name!r} fails: {describe(error)}") from error


def describe(error):
    """The error and, if it is not here, the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    own = place.filename == __file__ or place.filename.startswith("<")
    where = "" if own else f" ({os.path.basename(place.filename)}, line {place.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def import_callable(name):
    """What `package.module:callable` or `path/to/file.py:callable` names.

    Raises:
        ValueError: if there is no such module, it cannot be imported, or it has no such callable.
    """
    module_name, _, attribute = name.rpartition(":")
    is_file = module_name.endswith(".py")
    if is_file and not os.path.isfile(module_name):
        raise ValueError(f"cannot be imported: there is no file {module_name!r}")
    try:
        if is_file:
            stem = os.path.splitext(os.path.basename(module_name))[0]
            spec = importlib.util.spec_from_file_location(f"custom_reward_{stem}", module_name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's, and may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            problem = f"there is no module {module_name!r} (a file is named {module_name}.py:{attribute})"
        else:
            problem = describe(error)
        raise ValueError(f"cannot be imported: {problem}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"cannot be used: {module_name!r} has no callable {attribute!r}")
    return function


def scores_of(function, images, prompts):
    """The scores of the images.

    Raises:
        ValueError: if the callable fails or returns no (B,) tensor of finite numbers.
        torch.OutOfMemoryError: the callable's.
    """
    try:
        scores = function(images, prompts)
    except torch.OutOfMemoryError:  # which says nothing of the reward
        raise
    except Exception as error:  # the callable is the user's, and may raise anything
        raise ValueError(f"fails on two random images: {describe(error)}") from error
    problem = problem_of(scores, prompts)
    if problem is not None:
        raise ValueError(f"is no reward: it {problem}")
    return scores


def has_gradient(function, images, prompts):
    """Whether the scores depend on the images by a gradient that is not zero everywhere."""
    images = images.clone().requires_grad_()
    try:
        scores = scores_of(function, images, prompts)
        if not scores.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):
        # What turns pictures into arrays, as a black box may, refuses those that ask for a gradient; and an operation
        # may have none.
        return False
    return gradient is not None and bool(gradient.any())


def load_custom(name, device, size, prompts):
    """Import a reward and try it on two random images.

    Args:
        name: `package.module:callable` or `path/to/file.py:callable`. The callable maps images (B, 3, H, W) in [0, 1]
            and B prompts to a (B,) tensor; its attribute `differentiable` says whether that has a gradient, and is
            found out, and logged, where there is none. A torch module is frozen and moved to `device`.
        size: height and width of the images to try, in pixels.
        prompts: two prompts.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with its name.
    """
    function = import_callable(name)
    declared = getattr(function, "differentiable", None)
    reward = CustomReward(name, function, declared).to(device).eval().requires_grad_(False)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        scores_of(function, images.clone(), prompts)
    if declared is None:
        reward.differentiable = has_gradient(function, images, prompts)
        found = "have a gradient" if reward.differentiable else "have no gradient: a black box"
        logger.info(f"reward {name!r}, tried on two random images: its scores {found}")
    elif declared and not has_gradient(function, images, prompts):
        raise ValueError("says it is differentiable, but its scores have no gradient")
    return reward
