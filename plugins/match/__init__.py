"""TomeMatch: which tokens merge into which."""
