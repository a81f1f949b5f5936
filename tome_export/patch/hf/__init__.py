"""Merging in models of Hugging Face Transformers."""
