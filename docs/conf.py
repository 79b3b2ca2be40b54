"""Sphinx builds the site from this folder: `make docs`."""

import os
import shutil
from pathlib import Path
from typing import ClassVar

from pygments.lexer import inherit
from pygments.lexers.shell import BashLexer
from pygments.token import Name

import structlora_trl

ROOT = Path(__file__).parent.parent
NOTEBOOK = "notebook.ipynb"  # a copy of the example, which lies outside of this folder

project = "structlora-trl"
author = "the structlora-trl authors"
release = version = structlora_trl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
nb_execution_mode = "off"  # the notebook is shown with the outputs that are stored in it
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# A table that is included from another page starts with its own heading level.
suppress_warnings = ["myst.header"]

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # a default as it is written, where its value fills a line
autodoc_typehints = "none"  # the docstrings state the types
autodoc_default_options = {"members": True}
napoleon_google_docstring = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"structlora-trl {release}"
html_copy_source = False
html_show_copyright = False
html_theme_options = {}
if repository := os.environ.get("GITHUB_REPOSITORY"):
    # Built by a workflow (docs.yml): links to the repository that runs it, and to each page's source there.
    address = f"{os.environ['GITHUB_SERVER_URL']}/{repository}/"
    html_theme_options = {
        "source_repository": address,
        "source_branch": "main",
        "source_directory": "docs/",
        "footer_icons": [{"name": "Repository", "url": address, "html": "Repository", "class": ""}],
    }


class Shell(BashLexer):
    """Bash, with options as tokens of their own, which tables.css keeps in one piece on a narrow screen."""

    tokens: ClassVar = {"data": [(r"(?<=\s)--?[a-z][\w.-]*", Name.Attribute), inherit]}


def setup(app):
    """Colour commands. Copy the notebook. Leave the fields of named tuples out: their docstrings say what they are."""
    app.add_lexer("bash", Shell)
    shutil.copyfile(ROOT / "examples" / "quickstart.ipynb", Path(app.srcdir) / NOTEBOOK)
    app.connect(
        "autodoc-skip-member", lambda app, what, name, item, skip, options: True if _is_field(item) else None
    )


def _is_field(item) -> bool:
    return (getattr(item, "__doc__", None) or "").startswith("Alias for field number")
