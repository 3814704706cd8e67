"""The version of fsam_ext, in one place."""

__version__ = "0.1.0"
