"""Transformers' vision models: recipes, and making them."""
