"""Data sets as TFDS builders, and which of their rows a step sees."""
