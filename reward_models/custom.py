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

import torch

from .base import check_scores, score_gradient
from .user_code import UserCode
from .videos import prepare


logger = logging.getLogger(__name__)


class CustomReward(torch.nn.Module):
    """A user's callable `(images, prompts) -> (B,)`, with the attributes of a reward, see `videos.py`.

    Every exception of the callable, except running out of memory, becomes a ValueError that names the reward.

    Args:
        name: for messages.
        function: the callable.
        code: `UserCode` that it runs in.

    Attributes:
        differentiable: whether its scores have a gradient, or `None` if the callable does not say so.

    Raises:
        ValueError: if an attribute of the callable has another value than True or False.
    """

    def __init__(self, name, function, code):
        super().__init__()
        self.name = name
        self.function = function
        self.code = code
        self.differentiable = declared(function, "differentiable")
        self.takes_videos = declared(function, "takes_videos") or False
        self.mean_over_frames = declared(function, "mean_over_frames") or False

    @property
    def fps(self):
        """Of the callable, if it has this attribute."""
        return self.function.fps

    @fps.setter
    def fps(self, value):
        self.function.fps = value

    def forward(self, images, prompts):
        with self.code.running(f"reward {self.name!r} fails"):
            # Without a gradient the callable gets a copy, so that in-place changes do not reach other rewards.
            return self.function(images if images.requires_grad else images.clone(), prompts)

    def check_prompts(self, prompts):
        """That of the callable, if it has one."""
        with self.code.running(f"reward {self.name!r} refuses the prompts"):
            getattr(self.function, "check_prompts", lambda prompts: None)(list(prompts))

    def gradient(self, scores, images):
        """See `score_gradient`, which runs the user's code if it has a backward pass of its own."""
        with self.code.running(f"reward {self.name!r} fails in its backward pass"):
            return score_gradient(scores, images)


def declared(function, attribute):
    """The value True or False of a callable's attribute, or `None` if it has no such attribute.

    Raises:
        ValueError: if it is anything else.
    """
    value = getattr(function, attribute, None)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"cannot be used: its attribute {attribute} is {value!r}, not True or False")
    return value


def find_module(name, attribute):
    """The spec of a module, which is not imported yet, though the packages that it is in are.

    Raises:
        ValueError: if it does not exist.
    """
    spec = None
    with UserCode("").running("cannot be imported"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # something that a package imports
                raise
    if spec is None:
        raise ValueError(f"cannot be imported: there is no module {name!r} (for a file, write {name}.py:{attribute})")
    return spec


def import_callable(name, options):
    """Import the callable that `package.module:callable` or `path/to/file.py:callable` names.

    A file can import the modules that lie beside it. Of a class, the callable is an instance, made with the options.

    Returns:
        (callable, `UserCode` that it runs in).

    Raises:
        ValueError: if the module does not exist, cannot be imported, or has no such callable, if its class takes other
            arguments than the options, or if there are options for what is no class.
    """
    module_name, _, attribute = name.rpartition(":")
    is_file = module_name.endswith(".py")
    if is_file and not os.path.isfile(module_name):
        raise ValueError(f"cannot be imported: there is no file {module_name!r}")
    if is_file:
        stem = os.path.splitext(os.path.basename(module_name))[0]
        spec = importlib.util.spec_from_file_location(f"custom_reward_{stem}", module_name)
    else:
        spec = find_module(module_name, attribute)
    code = UserCode(os.path.dirname(spec.origin or ""), imports_neighbours=is_file)
    with code.running("cannot be imported"):
        if is_file:
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        function = getattr(module, attribute, None)
    if isinstance(function, type):
        arguments = f"with {', '.join(options)}" if options else "without arguments"
        with code.running(f"cannot be used: making an instance of the class {arguments} fails"):
            function = function(**options)
    elif options:
        raise ValueError(
            f"has no option {next(iter(options))!r}: options are for classes, which get them when they are made"
        )
    if not callable(function):
        raise ValueError(f"cannot be used: {module_name!r} has no callable {attribute!r}")
    return function, code


def score_random_images(reward, images, prompts, state=""):
    """Score the two random images or videos on which a custom reward is tested.

    Args:
        state: what is special about them, for messages.

    Raises:
        ValueError: if the callable fails, or does not return a (B,) tensor of finite numbers.
        torch.OutOfMemoryError: if the callable runs out of memory.
    """
    with reward.code.running(f"fails on two {random_kind(reward)}{state}"):
        scores = reward.function(images, prompts)
    check_scores(scores, prompts, "is not a reward: it")
    return scores


def random_kind(reward):
    return "random videos" if reward.takes_videos else "random images"


def has_gradient(reward, images, prompts):
    """Whether the scores have a gradient with respect to the images or videos that is not zero everywhere."""
    images = images.clone().requires_grad_()
    try:
        scores = score_random_images(reward, images, prompts, " that require a gradient")
        if not scores.requires_grad:
            return False
        with reward.code.running(f"fails in its backward pass on two {random_kind(reward)}"):
            return bool(score_gradient(scores, images).any())
    except ValueError as error:
        # Black boxes often fail on images that require a gradient (Tensor.numpy does), or use an operation that has no
        # backward pass.
        logger.info(f"reward {reward.name!r} {error}")
        return False


def load_custom(name, device, size, prompts, fps=None, options=None):
    """Import a custom reward and test it on two random images, or on two random videos if it takes videos.

    The callable's attribute `differentiable` says whether its scores have a gradient. Without this attribute the test
    determines it, and logs the result.

    Args:
        name: `package.module:callable` or `path/to/file.py:callable`. The callable maps images (B, 3, H, W) in [0, 1]
            and B prompts to a (B,) tensor, or videos (B, F, 3, H, W) if its attribute `takes_videos` is True. Of a
            class, an instance is made. A torch module is frozen and moved to `device`.
        device: device of the random images, and of the callable if it is a torch module.
        size: height and width of the random images in pixels, and the number of frames of videos.
        prompts: two prompts.
        fps: frames per second of videos, for a callable with an attribute `fps`.
        options: {name: text}, keywords of a class.

    Raises:
        ValueError: if the callable cannot be imported, is not a valid reward, or takes videos and `size` is that of
            images. The caller puts the reward's name in front of the message.
    """
    reward = CustomReward(name, *import_callable(name, options or {})).to(device).eval().requires_grad_(False)
    prepare(reward, size, fps)
    frames = size[2:] if reward.takes_videos else ()
    images = torch.rand(2, *frames, 3, *size[:2], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        score_random_images(reward, images.clone(), prompts)
    if reward.differentiable is None:
        reward.differentiable = has_gradient(reward, images, prompts)
        result = "have a gradient" if reward.differentiable else "have no gradient: a black box"
        logger.info(f"reward {name!r}, tried on two {random_kind(reward)}: its scores {result}")
    elif reward.differentiable and not has_gradient(reward, images, prompts):
        raise ValueError("says it is differentiable, but its scores have no gradient")
    return reward
