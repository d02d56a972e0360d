"""Data sets as float images in [0, 1], their splits, and their division among clients."""

from fedkl.data.images import FolderImages, Images, TensorImages, augment
from fedkl.data.partition import PARTITIONS, partition
from fedkl.data.sources import DATASETS
from fedkl.data.splits import DataBundle, load

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "DataBundle",
    "FolderImages",
    "Images",
    "TensorImages",
    "augment",
    "load",
    "partition",
]
