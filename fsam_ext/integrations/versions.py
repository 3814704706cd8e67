"""What an adapter was tested with: with another version it says so, rather than train wrongly."""

from __future__ import annotations

from importlib.metadata import version


def require(package: str, tested: str) -> None:
    """Lets pass the versions of a package that begin with ``tested``.

    Raises:
        ImportError: another version is installed.
        PackageNotFoundError: none is.
    """
    installed = version(package)
    if not f"{installed}.".startswith(f"{tested}."):
        raise ImportError(
            f"this adapter was tested with {package} {tested}, and {installed} may call its hooks in another order; "
            f"install {package}=={tested}.*, or make the two passes with fsam_ext.SecondPass"
        )
