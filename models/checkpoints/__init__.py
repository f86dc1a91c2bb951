"""Files to models and back.

tensors    files of named tensors (stored), one module per format: *_file; scaled: 8-bit weights and their scales
table      our names and published ones, as data; structure: networks read off names and shapes; *_keys: those that families share
parts      what a file holds; folder: what a diffusers folder holds; harmless, foreign: what else may be in a file
describe   from what was found (findings) to a model's description; towers: of its text encoders; scheduler; latents: their units
vocabulary the tokenizers of text encoders
blank      networks without weights
load, native (our own format)
save       in a published layout: single_file, diffusers_folder; written: what these share; own_settings: what only this library reads
"""
