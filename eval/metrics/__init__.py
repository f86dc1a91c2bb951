"""Numbers from features: distances between sets, and what single samples score."""
