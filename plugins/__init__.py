"""TensorRT plugins for the match and merge steps."""
