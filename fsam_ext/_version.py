"""The version of fsam_ext, in one place."""

__version__ = "0.2.0"
