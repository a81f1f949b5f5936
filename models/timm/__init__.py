"""timm's models: recipes, and making them."""
