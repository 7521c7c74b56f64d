"""How fast and how large a model is on this machine, end to end through the engine. Knows no terminal."""
