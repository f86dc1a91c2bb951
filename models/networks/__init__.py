"""The networks, one file each: a frozen dataclass of parameters and its modules."""
