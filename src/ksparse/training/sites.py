"""One recipe for several sites of an LM: an SAE at each, trained together on one pass.

    at_sites(recipe)             {site: the recipe there}, from a list or a pattern
    site_folder(parent, site)    the folder of a site's run

Each is an ordinary run, of a recipe that names its own site, and is resumed and evaluated as any
other. Nothing else is written into the folder that they share.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from ksparse.config import Planted, Recipe
from ksparse.errors import InputError
from ksparse.lm.patterns import sites_of
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder


def at_sites(recipe: Recipe) -> dict[str, Recipe]:
    """Return a recipe at each of the sites that it names.

    Args:
        recipe: a recipe whose `acts.site` is one site, a list or a pattern.

    Returns:
        {site: recipe}, in the order of the list, and of the LM's blocks for a pattern.

    Raises:
        InputError: the LM's config cannot be read, or a name or pattern has no site.

    Example:
        >>> from ksparse.config import recipe_of
        >>> recipes = at_sites(recipe_of(lm="pylm/0.3m", site="mlp_out.*"))
        >>> list(recipes), recipes["mlp_out.2"].acts.site
        (['mlp_out.0', 'mlp_out.1', 'mlp_out.2', 'mlp_out.3'], 'mlp_out.2')
    """
    if Planted.from_text(recipe.acts.text) and recipe.acts.names_several_sites:
        raise InputError(
            f"acts.site is {recipe.acts.site!r} and acts.text is planted features, which have no "
            "sites; leave acts.site out"
        )
    return {
        site: dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, site=site))
        for site in sites_of(recipe.acts)
    }


def site_folder(parent: Path | str, site: str) -> Path:
    """Return the folder of a site's run in that of all, whose name needs no quoting in a shell.

    Raises:
        InputError: the folder of all is a run itself.

    Example:
        >>> site_folder("runs/all", "model.layers.3.mlp:in").as_posix()
        'runs/all/model.layers.3.mlp_in'
    """
    if RunFolder(Path(parent)).exists():
        raise InputError(
            f"{parent} is a run, of one site; for several sites give another --out, in which each "
            "has a folder"
        )
    return atomic.inside(Path(parent), re.sub(r"[^\w.-]+", "_", site))
