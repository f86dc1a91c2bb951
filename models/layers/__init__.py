"""What networks are made of: torch's own layers, put together. Nothing here knows a network or a file."""
