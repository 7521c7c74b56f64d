"""How good a model is, as numbers. Knows models and their files, not how they are served."""
