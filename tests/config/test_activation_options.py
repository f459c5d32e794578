"""What the options of activations say to rooms without torch."""

import pytest

from ksparse import config


@pytest.mark.parametrize(
    "sae, needed",
    [
        ({}, False),
        ({"multi_topk": 0.125}, True),
        *(({"activation": {"kind": kind}}, kind != "topk") for kind in config.ACTIVATION_CONFIGS),
    ],
    ids=str,
)
def test_a_recipe_says_whether_it_needs_autograd(sae, needed):
    assert config.from_dict({"sae": sae}).needs_autograd is needed


@pytest.mark.parametrize("kind", config.ACTIVATION_CONFIGS)
def test_auxk_is_used_where_the_activation_revives_by_it_and_it_has_a_weight(kind):
    def used(**sae):
        return config.from_dict({"sae": {"activation": {"kind": kind}, **sae}}).sae.uses_auxk

    assert (
        used() is (config.ACTIVATION_CONFIGS[kind].REVIVAL == "auxk")
        and used(auxk_coef=0.0) is False
    )
