"""Files of tensors and texts, whatever their format. Nothing here knows a family.

tensors    a file of named tensors (stored), one module per format: *_file; scaled: 8-bit weights and their
           scales
table      our names and published ones, as data: it loads and, read backwards, saves; structure: networks
           read off names and shapes
blank      networks without weights, for those of a file
writing    files that are whole at any moment; text: text and JSON, read within limits
"""
