"""torchvision's ViTs: recipes, and making them."""
