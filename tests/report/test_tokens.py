"""Text from data, made safe to look at."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksparse.report.tokens import TOKEN_LIMIT, is_right_to_left, safe_text, safe_token, token_of


@pytest.mark.parametrize(
    "text, shown",
    [
        (" return", " return"),
        ("\n    ", "↵····"),
        (" ", "·"),
        ("\t", "⇥"),
        ("a  b", "a··b"),
        ("", "⟨empty⟩"),
        ("\x00", "⟨U+0000⟩"),
        ("\u202e", "⟨U+202E⟩"),
        ("\u2066x\u2069", "⟨U+2066⟩x⟨U+2069⟩"),
        ("\u200b", "⟨U+200B⟩"),
        ("\u2028", "⟨U+2028⟩"),
        ("\u00a0", "⟨U+00A0⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\ue000", "⟨U+E000⟩"),
        ("\u0301", "◌\u0301"),
        ("naïve €", "naïve €"),
        ("<b>", "<b>"),
    ],
)
def test_a_token_shows_what_cannot_be_seen(text: str, shown: str) -> None:
    assert safe_token(text) == shown


def test_a_long_token_is_cut_and_says_how_long_it_was() -> None:
    assert safe_token("x" * 1_000_000) == "x" * TOKEN_LIMIT + "… (1,000,000 characters)"


def test_other_text_keeps_its_spaces() -> None:
    assert safe_text("a  b\nc") == "a  b↵c"


@pytest.mark.parametrize(
    "number, shown", [(0, "·"), (1, "a"), (2, "⟨2⟩"), (-1, "⟨-1⟩"), (10**12, "⟨1000000000000⟩")]
)
def test_a_token_without_a_string_is_its_id(number: int, shown: str) -> None:
    assert token_of([" ", "a"], number) == shown


def test_only_text_from_right_to_left_needs_isolation() -> None:
    assert (
        is_right_to_left("مرحبا") and is_right_to_left("שלום") and not is_right_to_left("naïve 1,2")
    )


@given(st.text(st.characters(), max_size=200))
def test_nothing_unseen_is_left_of_any_text(text: str) -> None:
    shown = safe_token(text)
    assert shown and shown.encode("utf-8")
    assert not {unicodedata.category(char) for char in shown} & {
        "Cc",
        "Cf",
        "Cs",
        "Co",
        "Cn",
        "Zl",
        "Zp",
    }
