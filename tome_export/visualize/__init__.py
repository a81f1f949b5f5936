"""Which patches became one token, and pictures of it."""
