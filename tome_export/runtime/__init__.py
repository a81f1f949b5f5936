"""What runs a model: named numpy arrays in, named numpy arrays out, whatever is behind it."""
