"""The options of planted features: ranges, and how a recipe names them."""

import pytest

from ksparse.config import Planted
from ksparse.errors import InputError


@pytest.mark.parametrize(
    "options, message",
    [
        ({"features": 0}, "features of planted features is 0"),
        ({"probability": 1.5}, "probability of planted features is 1.5"),
        ({"probability": 0.1, "least": 0.2}, "more than probability, 0.1"),
        ({"exponent": 1.0}, "give least"),
        ({"sizes": (1.0,)}, "give two numbers"),
        ({"spread": (-1.0, 0.0)}, "give two numbers"),
        ({"features": 4, "roots": 5}, "more than the 4 features"),
    ],
)
def test_what_cannot_be_planted_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Planted(**options)


def test_a_recipe_names_planted_features_by_what_differs_from_the_defaults():
    options = Planted(features=512, sizes=(5, 4), scaled=True)
    assert Planted.from_text(options.to_text()) == options
    assert options.to_text() == 'planted:{"features": 512, "scaled": true, "sizes": [5.0, 4.0]}'
    assert Planted.from_text("my texts/planted") is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("planted:512", "as a JSON object"),
        ("planted:{", "as a JSON object"),
        ('planted:{"feature": 5}', "unknown key 'feature' of planted features; they are features"),
    ],
)
def test_a_name_of_planted_features_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Planted.from_text(text)
