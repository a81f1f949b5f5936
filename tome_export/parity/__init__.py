"""Parity: does the exported graph decide and compute what PyTorch does, as rounding allows?"""
