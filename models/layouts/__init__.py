"""Models in files: `load` makes a model of files, and `save` writes one in the layout of your choice.

parts, folder            the networks in a file, and in a diffusers folder
harmless, unsupported    keys and files that are something else
findings, describe       what was found, and the model's description
towers, latents          its text encoders, and the units of its latents
scheduler                its schedule and grid; schedule_table, ldm_yaml: schedules in tensors and YAML files
native                   our own format
single_file, diffusers_folder, export, own_settings    other formats, and what they share
"""
