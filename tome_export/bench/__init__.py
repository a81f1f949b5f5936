"""How fast a model runs, and where the time goes."""
