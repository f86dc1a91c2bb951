"""Files to models and back.

tensors    named tensors in files: safetensors, pickles, shards
table      our names and published ones, as data; *_keys: one module per kind of network
parts      what a file holds; folder: what a diffusers folder holds; harmless, foreign: what else may be in a file
describe   from the parts to a model's description; blank: networks without weights
load, save, native (our own format)
"""

from models.checkpoints.load import load
from models.checkpoints.save import save

__all__ = ["load", "save"]
