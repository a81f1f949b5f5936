"""LLaVA's vision towers: recipes, and making them."""
