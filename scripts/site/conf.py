"""Settings of Sphinx for the site; `build.py` puts them beside the staged pages."""

project = html_title = "ksparse"
author = "The ksparse project"
extensions = ["myst_nb"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = html_show_sphinx = html_show_sourcelink = html_copy_source = False
html_use_index = html_domain_indices = False
smartquotes = False  # they make dashes of the two hyphens of a flag
highlight_language = "text"  # of a block that names none
pygments_style, pygments_dark_style = "friendly", "github-dark"
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are shown as they were run by scripts/run_notebooks.py
nb_merge_streams = True
