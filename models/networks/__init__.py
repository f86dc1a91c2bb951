"""The networks, one file each: a frozen dataclass of parameters and the modules that it describes."""
