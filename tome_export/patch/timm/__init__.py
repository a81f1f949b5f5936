"""Merging in models of timm."""
