"""What runs a model: named numpy arrays in, named numpy arrays out, whatever is behind it.

A backend is one module with one subclass of ``runner.Backend``, and one line in ``registry``.
"""
