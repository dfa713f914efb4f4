"""Settings of the site; `build.py` copies this file beside what it has gathered."""

from mvar_lightning import __version__

project = "mvar_lightning"
release = version = __version__
author = "the authors of mvar_lightning"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
html_theme = "furo"
html_title = "mvar_lightning"
html_favicon = "static/icon.svg"  # the page's own
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1b5c9e", "color-brand-content": "#1b5c9e"},
    "dark_css_variables": {"color-brand-primary": "#6db1f2", "color-brand-content": "#6db1f2"},
}
html_copy_source = False
html_show_copyright = False
exclude_patterns = ["data/*", "docs/evidence/*"]  # tables that docs/evidence.md holds

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
nb_execution_mode = "off"  # a test executes the notebook

default_role = "literal"  # docstrings write names in single backticks
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # of Lightning, whose references lead nowhere here
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
suppress_warnings = ["misc.highlighting_failure"]  # blocks that are half shell, half words
