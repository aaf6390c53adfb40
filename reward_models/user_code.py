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
"""Running the code of a custom reward: its imports, and its failures in one line."""

import os
import sys
import traceback
from contextlib import contextmanager, nullcontext
from importlib.machinery import PathFinder

import torch


class Neighbours:
    """Within it, the modules in a folder can be imported, if no other module has their name.

    They are not in `sys.modules` outside of it, so that the files of two folders may have the same name.

    Args:
        folder: absolute path.
    """

    def __init__(self, folder):
        self.folder = folder
        self.names = set()
        self.modules = {}
        self.depth = 0

    def find_spec(self, name, path=None, target=None):
        """Called by `import` for a module that nothing else on `sys.meta_path` finds."""
        spec = PathFinder.find_spec(name, [self.folder]) if path is None else None
        if spec is not None:
            self.names.add(name)
        return spec

    def __enter__(self):
        self.depth += 1  # a backward pass may contain forward passes, see `PerFrame`
        if self.depth == 1:
            sys.modules.update(self.modules)
            sys.meta_path.append(self)

    def __exit__(self, *exception):
        self.depth -= 1
        if self.depth > 0:
            return
        sys.meta_path.remove(self)
        # Submodules are found through their package, not here.
        own = [name for name in sys.modules if name.partition(".")[0] in self.names]
        self.modules.update({name: sys.modules.pop(name) for name in own})


class UserCode:
    """The code of a custom reward.

    Args:
        folder: absolute path of the folder of its file, or "" if it has none.
        imports_neighbours: whether it can import the modules in that folder.
    """

    def __init__(self, folder, imports_neighbours=False):
        self.folder = folder
        self.neighbours = Neighbours(folder) if imports_neighbours else nullcontext()

    @contextmanager
    def running(self, problem):
        """Within it, every failure except running out of memory is a ValueError of one line that begins with `problem`."""
        with self.neighbours:
            try:
                yield
            except torch.OutOfMemoryError:  # says nothing about the code
                raise
            except (Exception, SystemExit) as error:  # the user's code may raise anything
                raise ValueError(f"{problem}: {self.describe(error)}") from error

    def describe(self, error):
        """Describe an exception, with the last line of the user's own files that led to it.

        If none did, it is the line that raised it, unless that is in this package.
        """
        message = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        frames = [(os.path.dirname(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__)]
        frames = [(folder, frame) for folder, frame in frames if folder]  # others are Python's own
        own = [frame for folder, frame in frames if folder == self.folder]
        others = [frame for folder, frame in frames if folder != os.path.dirname(__file__)]
        if not own and not others:
            return message
        place = (own or others)[-1]
        source = f": {place.line}" if place.line else ""
        return f"{message} ({os.path.basename(place.filename)}, line {place.lineno}{source})"
