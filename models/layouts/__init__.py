"""Models in files: `load` finds out what files hold and makes a model of it, `save` writes one in the layout
of one's choice.

load       parts: what a file holds; folder: what a diffusers folder holds; harmless, foreign: what else may
           be in a file
describe   from what was found (findings) to a model's description; towers: of its text encoders; scheduler;
           latents: their units
save       native (our own format), single_file, diffusers_folder; written: what these share; own_settings:
           what only this library reads
"""
