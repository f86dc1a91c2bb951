"""Data: pictures in folders, tar shards and NumPy files, their classes and captions; data sets to train on,
and what reads them."""

from train.data.dataset import Batch, Dataset, TensorData, digits, shuffled_batches
from train.data.pictures import DATASETS, PictureData

__all__ = ["DATASETS", "Batch", "Dataset", "PictureData", "TensorData", "digits", "shuffled_batches"]
