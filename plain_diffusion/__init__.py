"""The version, the command `plain-diffusion`, and a check that the packages found are this library's.

No other project gives a module this name, so this package is always found. It needs only the standard
library.
"""

import plain_diffusion.starting  # noqa: F401
from plain_diffusion.packages import check

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = ["__version__", "check"]
