import mmfusion

project = "mmfusion"
author = copyright = "The mmfusion developers"
version = release = mmfusion.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_typehints = "none"  # the signature says them already
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of a NamedTuple are listed once
napoleon_custom_sections = [("Shape", "notes_style")]

# Types of other packages, which nothing here needs to link to (the build fetches no inventory).
nitpick_ignore_regex = [(r"py:.*", r"(torch|Tensor|nn|Generator|collections|os|numpy|Any|Rates).*")]

html_theme = "furo"
html_title = "mmfusion"
html_static_path = ["_static"]
