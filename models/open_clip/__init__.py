"""Open_clip's image towers: recipes, and making them."""
