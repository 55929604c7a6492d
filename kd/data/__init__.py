"""Folders and named data sets, views, and the LightningDataModule."""

from kd.data.datamodule import ImageData
from kd.data.folders import load_image, read_folder, read_splits
from kd.data.images import LabelledImages, Splits, channel_statistics, keep_fraction
from kd.data.named import DATASETS, cache_dir, load_splits
from kd.data.views import AUGMENTATIONS, EpochSampler, Views, plain_view, training_view

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "EpochSampler",
    "ImageData",
    "LabelledImages",
    "Splits",
    "Views",
    "cache_dir",
    "channel_statistics",
    "keep_fraction",
    "load_image",
    "load_splits",
    "plain_view",
    "read_folder",
    "read_splits",
    "training_view",
]
