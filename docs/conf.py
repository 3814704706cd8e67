"""How Sphinx makes the site of these pages: ``make docs``."""

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "fsam_ext"
author = "the authors of fsam_ext"
version = release = re.search(r'__version__ = "(.+)"', (ROOT / "fsam_ext/_version.py").read_text())[1]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_static"]

# GitHub renders the same files, so they keep to what it knows; its anchors are these too.
myst_heading_anchors = 4
suppress_warnings = ["myst.xref_ambiguous"]

html_theme = "furo"
html_title = f"fsam_ext {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
# Nobody wants to paste the plus and minus of a diff.
copybutton_selector = "div:not(.highlight-diff) > div.highlight > pre"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Docstrings are read from the package; the frameworks that its adapters import need not be installed for that.
autodoc_mock_imports = ["accelerate", "composer", "lightning", "timm", "torchmetrics", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# Every reference to a name of ours has to be found. Names of torch, of Python and of frameworks lie on sites that the
# build does not ask.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fsam_ext)(?!FriendlySAM|SAM$|SecondPass|FlatParameters).*")]


def _as_meant(app, what, name, obj, options, lines: list[str]) -> None:
    """Keeps reStructuredText from taking |d| for a name to be replaced, and Napoleon from taking what comes before the
    colon of a property's sentence for its type."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[number] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)
    if what == "property":
        lines[0] = lines[0].replace(": ", "; ", 1)


def setup(app) -> None:
    """Sphinx calls this; Napoleon's turn comes at 500."""
    app.connect("autodoc-process-docstring", _as_meant, priority=400)
