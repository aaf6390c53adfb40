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
"""The captions of a dataset."""

import itertools
import os

import datasets
from datasets import load_dataset, load_from_disk
from reward_models.loading import first_line

from .prompts import DATASET_FILES, DEFAULT_SPLIT, SAVED_DATASET, SAVED_SPLITS, ending_of, unique_prompts


def load_captions(args):
    """The texts in --caption_column of --dataset_name, up to --max_prompts, each once.

    Raises:
        ValueError: for a dataset that cannot be loaded, and a missing column.
    """
    try:
        dataset = _open_dataset(args)
        # A stream may not know its columns before it has begun.
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if args.caption_column not in columns:
            raise ValueError(f"no --caption_column {args.caption_column!r} in it, only {', '.join(columns)}")
        # Selecting the column keeps the images of the dataset from being read.
        rows = itertools.islice(dataset.select_columns(args.caption_column), args.max_prompts)
        captions = [row[args.caption_column] for row in rows]
        # Where an image has several captions, the first.
        captions = [caption[0] if isinstance(caption, list) and caption else caption for caption in captions]
        return unique_prompts(caption for caption in captions if isinstance(caption, str))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset_name {args.dataset_name!r}: {first_line(error.__cause__ or error)}") from error


def _open_dataset(args):
    name = args.dataset_name
    options = {"split": args.dataset_split, "streaming": args.dataset_streaming, "cache_dir": args.cache_dir}
    if any(os.path.isfile(os.path.join(name, file)) for file in (SAVED_DATASET, SAVED_SPLITS)):
        return _open_saved(name, args.dataset_split)
    if not os.path.isfile(name):
        return load_dataset(name, args.dataset_config_name, **options)
    kind = DATASET_FILES.get(ending_of(name))
    if kind is None:
        raise ValueError(f"a file of this kind cannot be read, only {', '.join(DATASET_FILES)}")
    return load_dataset(kind, data_files=name, **options)


def _open_saved(folder, split):
    """The dataset of a folder that save_to_disk has written; its rows are read when they are needed.

    Raises:
        ValueError: if it is damaged, or does not have the split.
    """
    try:
        dataset = load_from_disk(folder)
    except Exception as error:  # what is missing in its files may be noticed anywhere
        raise ValueError(f"a damaged folder of save_to_disk: {type(error).__name__}: {first_line(error)}") from None
    if not isinstance(dataset, dict):
        if split not in (DEFAULT_SPLIT, str(dataset.split)):
            raise ValueError(f"no --dataset_split {split!r} in it: it has no splits")
        return dataset
    if split not in dataset:
        raise ValueError(f"no --dataset_split {split!r} in it, only {', '.join(dataset)}")
    return dataset[split]
