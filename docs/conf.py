"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

from xenmapcache import __version__

project = "xenmapcache"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
autodoc_preserve_defaults = True
html_theme_options = {
    "sidebar_width": "240px",
    "description": "A map cache over Xen guests' memory",
    "fixed_sidebar": True,
}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
