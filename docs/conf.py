"""Sphinx: ``python -m sphinx -W docs docs/_build`` (extra ``docs``)."""

from typing import Any

import vmamba_jax

project, author, release = "vmamba_jax", "the vmamba_jax authors", vmamba_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["_build", "jupyter_execute"]  # the second is what myst-nb leaves behind
default_role = "code"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
nb_execution_mode = "off"  # the tests run the notebooks


def setup(app: Any) -> None:
    """Leaves out members that their class describes: NamedTuple's fields, a module's dtypes."""

    def skip(_app: Any, what: str, _name: str, member: Any, skipped: bool, _options: Any) -> bool:
        alias = (getattr(member, "__doc__", "") or "").startswith("Alias for field number")
        return skipped or alias or (what == "class" and isinstance(member, type))

    app.connect("autodoc-skip-member", skip)
