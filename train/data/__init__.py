"""Data sets to train on, and the pictures, classes and captions of folders, tar shards and NumPy files."""

from train.data.dataset import Batch, Dataset, TensorData, digits, shuffled_batches
from train.data.pictures import DATASETS, PictureData

__all__ = ["DATASETS", "Batch", "Dataset", "PictureData", "TensorData", "digits", "shuffled_batches"]
