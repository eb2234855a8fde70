"""Read and write the dictionary formats of other libraries.

One module per format maps files to plain data: fields of a configuration and tensors under the native names. Nothing here
knows a model class.
"""
