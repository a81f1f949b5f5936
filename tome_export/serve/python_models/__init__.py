"""Models of the server's python backend, copied as they are into a repository.

Each file is the whole of a ``model.py``: it needs the standard library, NumPy and (preprocess)
Pillow, never this package or torch, and reads one JSON file beside it.
"""
