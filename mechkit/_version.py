"""The version, read by the build and by `mechkit --version`."""

__version__ = "0.1.0"
