"""Sphinx builds the site from this folder: `make docs`."""

import structlora_trl

project = "structlora-trl"
author = "the structlora-trl authors"
release = version = structlora_trl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
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


def setup(app):
    """Leave the fields of named tuples out: their docstrings say what they are."""
    app.connect(
        "autodoc-skip-member", lambda app, what, name, item, skip, options: True if _is_field(item) else None
    )


def _is_field(item) -> bool:
    return (getattr(item, "__doc__", None) or "").startswith("Alias for field number")
