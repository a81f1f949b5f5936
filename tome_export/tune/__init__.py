"""Which layers should merge how many tokens."""
