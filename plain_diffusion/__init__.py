"""What every other package begins with: the version, the `plain-diffusion` command, and a check that the
packages found are this library's.

Of all our packages, this one has a name that nobody else gives to a module, so that it is always found. Needs
the standard library only.
"""

import plain_diffusion.starting  # noqa: F401
from plain_diffusion.packages import check

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = ["__version__", "check"]
