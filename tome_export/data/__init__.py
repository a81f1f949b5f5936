"""Images and labels as people have them: what eval, tune, cascade, check and inspect read."""
