"""A page on this machine: watch an image grow, paint into it, compare models, look inside (`mvar demo`)."""
