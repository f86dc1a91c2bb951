"""Pictures that a model draws, and any source of pictures from its description."""
