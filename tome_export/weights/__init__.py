"""Tensors of files: reading checkpoints and shards of them, and whether they fit a module.

Nothing here runs code that a file holds, and a tensor that nobody asks for stays in its file.
"""
