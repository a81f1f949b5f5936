"""Merging in models of open_clip."""
