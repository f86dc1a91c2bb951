"""Where pictures come from: folders, tar shards, arrays, models."""
