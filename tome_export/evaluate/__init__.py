"""How often a model is right, on any number of images."""
