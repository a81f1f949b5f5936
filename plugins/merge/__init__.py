"""TomeMerge: size-weighted means of merged tokens."""
