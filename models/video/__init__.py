"""Video towers on CLIP: recipes, and making them."""
