"""Files of tensors and texts in every format. Nothing here knows a family.

tensors    a file of named tensors (stored), with one module per format: *_file
scaled     8-bit weights and their scales
table      our names and published ones, as data: loads, and read backwards saves
structure  reads networks off names and shapes
blank      networks without weights, to be loaded from a file
writing    files that are complete at any moment
text       text and JSON, read within limits
"""
