"""What training and evaluation know of data: where pictures lie, their order, classes and captions; data sets, and what reads them."""

from train.data.dataset import Batch, Dataset, TensorData, digits, shuffled_batches
from train.data.pictures import DATASETS, PictureData

__all__ = ["DATASETS", "Batch", "Dataset", "PictureData", "TensorData", "digits", "shuffled_batches"]
