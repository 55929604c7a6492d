"""Folders and named data sets, views, and the LightningDataModule."""

from kd.data.batches import Batches
from kd.data.datamodule import ImageData
from kd.data.datasets import DATASETS, cache_dir, load_splits, validation_images
from kd.data.decoded import Room, decoded
from kd.data.examination import BROKEN, Oddity, examine, in_both, without_broken
from kd.data.folders import load_image, read_folder, read_splits, read_unlabeled
from kd.data.geometry import Placement, RandomPlacement, cut, cut_batch
from kd.data.images import (
    UNLABELED,
    LabeledImages,
    Splits,
    channel_statistics,
    hide_labels,
    joined,
    keep_fraction,
    matched,
)
from kd.data.mixing import Mixing
from kd.data.sharding import write_shards
from kd.data.shards import ShardedSplits, read_shards
from kd.data.streamed import ShardData
from kd.data.views import AUGMENTATIONS, EpochSampler, Views, plain_view, short_side, training_view

__all__ = [
    "AUGMENTATIONS",
    "BROKEN",
    "DATASETS",
    "UNLABELED",
    "Batches",
    "EpochSampler",
    "ImageData",
    "LabeledImages",
    "Mixing",
    "Oddity",
    "Placement",
    "RandomPlacement",
    "Room",
    "ShardData",
    "ShardedSplits",
    "Splits",
    "Views",
    "cache_dir",
    "channel_statistics",
    "cut",
    "cut_batch",
    "decoded",
    "examine",
    "hide_labels",
    "in_both",
    "joined",
    "keep_fraction",
    "load_image",
    "load_splits",
    "matched",
    "plain_view",
    "read_folder",
    "read_shards",
    "read_splits",
    "read_unlabeled",
    "short_side",
    "training_view",
    "validation_images",
    "without_broken",
    "write_shards",
]
