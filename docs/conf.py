"""The site: `make docs` builds it into docs/_build/html. Warnings are errors there."""

import types

import sysmt

project = "sysmt"
author = "the sysmt developers"
copyright = "the sysmt developers, Apache-2.0"
version = release = sysmt.__version__

extensions = [
    "myst_nb",  # Markdown pages, and notebooks run while the site is built
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
]
exclude_patterns = ["_build", "_templates", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
nitpicky = False  # numpydoc's types are prose ("int64 tensor (N,)"), of which not every word is a name

# Markdown as GitHub shows it too: headings are link targets, nothing exotic.
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]

# A notebook is run again only when it has changed itself; `make clean` has all of them run anew.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

# One page per module, made from __all__: a public name cannot be forgotten.
default_role = "py:obj"  # `name` in a docstring links to its page
autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings name types, and shapes and units besides
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_attributes_as_param_list = True


html_theme = "furo"
html_title = f"sysmt {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"top_of_page_buttons": []}


def skip_aliases(app, what, name, obj, skip, options):
    """Leave out names of types, such as ``Affine = tuple[...]``: there is nothing to call."""
    return True if isinstance(obj, types.GenericAlias) else None


def setup(app):
    """Tell Sphinx of the hook above."""
    app.connect("autodoc-skip-member", skip_aliases)
