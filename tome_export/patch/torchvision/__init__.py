"""Merging in models of torchvision."""
