"""The version of this package, for pyproject.toml too."""

__version__ = "0.1.0"
