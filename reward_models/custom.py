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
"""Custom rewards, written as `package.module:callable` or `path/to/file.py:callable`."""

import importlib
import importlib.util
import logging
import os
import sys
import traceback

import torch

from .base import find_problem


logger = logging.getLogger(__name__)


class CustomReward(torch.nn.Module):
    """A user's callable `(images, prompts) -> (B,)` with the attribute `differentiable`.

    Its forward pass turns every exception of the callable, except running out of memory, into a ValueError that names
    the reward.
    """

    def __init__(self, name, function, differentiable):
        super().__init__()
        self.name = name
        self.function = function
        self.differentiable = differentiable

    def forward(self, images, prompts):
        try:
            # Without a gradient the callable gets a copy, so that in-place changes do not reach other rewards.
            return self.function(images if images.requires_grad else images.clone(), prompts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ValueError(f"reward {self.name!r} fails: {describe_error(error)}") from error


def describe_error(error):
    """Describe an exception, with the line that raised it unless that line is in this file."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    own = place.filename == __file__ or place.filename.startswith("<")
    where = "" if own else f" ({os.path.basename(place.filename)}, line {place.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def import_callable(name):
    """Import the callable that `package.module:callable` or `path/to/file.py:callable` names.

    Raises:
        ValueError: if the module does not exist, cannot be imported, or has no such callable.
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
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            problem = f"there is no module {module_name!r} (for a file, write {module_name}.py:{attribute})"
        else:
            problem = describe_error(error)
        raise ValueError(f"cannot be imported: {problem}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"cannot be used: {module_name!r} has no callable {attribute!r}")
    return function


def score_random_images(function, images, prompts):
    """Score the two random images on which a custom reward is tested.

    Raises:
        ValueError: if the callable fails, or does not return a (B,) tensor of finite numbers.
        torch.OutOfMemoryError: if the callable runs out of memory.
    """
    try:
        scores = function(images, prompts)
    except torch.OutOfMemoryError:  # says nothing about the reward
        raise
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"fails on two random images: {describe_error(error)}") from error
    problem = find_problem(scores, prompts)
    if problem is not None:
        raise ValueError(f"is not a reward: it {problem}")
    return scores


def has_gradient(function, images, prompts):
    """Whether the scores have a gradient with respect to the images that is not zero everywhere."""
    images = images.clone().requires_grad_()
    try:
        scores = score_random_images(function, images, prompts)
        if not scores.requires_grad:
            return False
        (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError):
        # Black boxes often fail on images that require a gradient (Tensor.numpy does), or use an operation that has no
        # backward pass.
        return False
    return gradient is not None and bool(gradient.any())


def load_custom(name, device, size, prompts):
    """Import a custom reward and test it on two random images.

    The callable's attribute `differentiable` says whether its scores have a gradient. Without this attribute the test
    determines it, and logs the result.

    Args:
        name: `package.module:callable` or `path/to/file.py:callable`. The callable maps images (B, 3, H, W) in [0, 1]
            and B prompts to a (B,) tensor. A torch module is frozen and moved to `device`.
        device: device of the random images, and of the callable if it is a torch module.
        size: height and width of the random images in pixels.
        prompts: two prompts.

    Raises:
        ValueError: if the callable cannot be imported or is not a valid reward. The caller puts the reward's name in
            front of the message.
    """
    function = import_callable(name)
    declared = getattr(function, "differentiable", None)
    reward = CustomReward(name, function, declared).to(device).eval().requires_grad_(False)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        score_random_images(function, images.clone(), prompts)
    if declared is None:
        reward.differentiable = has_gradient(function, images, prompts)
        result = "have a gradient" if reward.differentiable else "have no gradient: a black box"
        logger.info(f"reward {name!r}, tried on two random images: its scores {result}")
    elif declared and not has_gradient(function, images, prompts):
        raise ValueError("says it is differentiable, but its scores have no gradient")
    return reward
