"""Image data sets, their views, and the LightningDataModules that load them."""

from kd.data.batches import Batches, WatchedLoader, seconds_waited
from kd.data.crops import RandomResizedCrop, crop_image
from kd.data.datamodule import ImageData
from kd.data.datasets import DATASETS, cache_dir, load_splits, validation_images
from kd.data.decode_cache import cache_decoded, room_for_cache, verify_cache
from kd.data.division import SPLIT_FILE, apply_division, divide, read_division, write_division
from kd.data.folders import load_image, read_folder, read_unlabeled
from kd.data.image_check import BROKEN, FileFinding, drop_broken, find_duplicates
from kd.data.images import UNEVEN, UNLABELED, LabeledImages, Splits, channel_statistics, is_uneven, match_classes
from kd.data.manifest import examine, read_manifest
from kd.data.mixing import Mixing
from kd.data.near_duplicates import find_near_duplicates
from kd.data.sharding import write_shards
from kd.data.shards import ShardedSplits
from kd.data.splits import Layout, alike, read_splits
from kd.data.streamed import ShardData, parts_of_step
from kd.data.views import AUGMENTATIONS, FIXED, plain_view, short_side, training_view
