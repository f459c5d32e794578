"""Explanations predict what their definition says, and the published trie's faults are gone from ours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksparse.evals.explanations.patterns import (
    ANY,
    GreedyMatcher,
    Matcher,
    TokenPattern,
    build_trie,
    merge_patterns,
    predict,
    walk_trie,
)

A, B, C, D, E = range(5)


def dense(matches, shape, latent):
    out = np.zeros(shape, np.float32)
    mine = matches.latent == latent
    out[matches.context[mine], matches.position[mine]] = matches.value[mine]
    return out


patterns_ = st.lists(
    st.builds(
        TokenPattern,
        st.lists(st.sampled_from([ANY, 0, 1, 2]), min_size=1, max_size=4).map(tuple),
        st.booleans(),
        st.floats(0.5, 4, width=32),
        st.integers(1, 3),
    ),
    max_size=6,
)


@settings(max_examples=150)
@given(
    st.lists(patterns_, min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=3),
    st.integers(0, 2**14),
)
def test_the_table_predicts_what_the_definition_predicts(explanations, rows, bits):
    tokens = np.array(rows)
    begins = ((bits >> np.arange(tokens.size)) & 1).astype(bool).reshape(tokens.shape)
    begins[:, 0] = True
    wanted = np.ones(tokens.shape, bool)
    wanted[:, 3] = False
    by_latent = {10 * i: merge_patterns(patterns) for i, patterns in enumerate(explanations)}
    matches = Matcher(by_latent).match(tokens, begins, wanted)
    for latent, patterns in by_latent.items():
        expected = (
            np.array(
                [predict(patterns, row, own) for row, own in zip(tokens.tolist(), begins.tolist())]
            )
            * wanted
        )
        np.testing.assert_allclose(dense(matches, tokens.shape, latent), expected, rtol=1e-6)


def test_nothing_is_predicted_twice_for_a_position_and_a_latent():
    explanation = {
        3: merge_patterns(
            [
                TokenPattern((A,), False, 1),
                TokenPattern((ANY,), False, 2),
                TokenPattern((B, A), False, 3),
                TokenPattern((ANY, A), False, 4),
            ]
        )
    }
    matches = Matcher(explanation).match(
        np.array([[B, A, A]]), np.array([[True, False, False]]), np.ones((1, 3), bool)
    )
    assert list(zip(matches.position.tolist(), matches.value.tolist())) == [(0, 2), (1, 3), (2, 4)]


def test_no_explanation_predicts_nothing():
    grid = np.zeros((2, 3), int)
    for kind in (Matcher, GreedyMatcher):
        assert not len(kind({}).match(grid, grid == 0, grid == 0).latent)
        assert not len(kind({1: []}).match(grid, grid == 0, grid == 0).latent)


# ---- the faults of the published code


def test_the_same_pattern_from_two_documents_has_the_mean_of_their_activations():
    joined = merge_patterns(
        [
            TokenPattern((A, B), False, 1.0),
            TokenPattern((A, B), False, 2.0),
            TokenPattern((A, B), False, 6.0),
            TokenPattern((A, B), True, 9.0),
        ]
    )
    assert joined == [TokenPattern((A, B), False, 3.0, 3), TokenPattern((A, B), True, 9.0, 1)]


def test_a_short_pattern_does_not_shadow_a_longer_one():
    explanation = [TokenPattern((A,), False, 1.0), TokenPattern((B, A), False, 5.0)]
    assert predict(explanation, [B, A, C, A], [True] + [False] * 3) == [0, 5, 0, 1]
    assert [walk_trie(build_trie(explanation), [B, A, C, A][: i + 1]) for i in range(4)] == [
        0,
        1,
        0,
        1,
    ]


def test_a_token_and_any_token_are_both_tried():
    explanation = [TokenPattern((A, B, C), False, 1.0), TokenPattern((D, ANY, C), False, 2.0)]
    tokens = [D, B, C]
    assert predict(explanation, tokens, [True, False, False]) == [0, 0, 2]
    assert (
        walk_trie(build_trie(explanation), tokens) == 0
    )  # it takes the token B and never comes back


def test_an_anchor_needs_the_beginning_of_a_document_wherever_in_the_context_it_is():
    anchored = [TokenPattern((A,), True, 1.0)]
    assert predict(anchored, [A, A, A], [True, False, True]) == [1, 0, 1]
    assert predict([TokenPattern((ANY, A), True, 1.0)], [A, A, A], [True, False, False]) == [
        0,
        1,
        0,
    ]


@pytest.mark.parametrize(
    "pattern, longer",
    [
        (TokenPattern((ANY, A), False, 1.0), TokenPattern((ANY, ANY, A), False, 2.0)),
        (TokenPattern((ANY, A), False, 1.0), TokenPattern((B, A), False, 2.0)),
        (TokenPattern((B, A), False, 1.0), TokenPattern((B, A), True, 2.0)),
        (TokenPattern((B, ANY, A), False, 1.0), TokenPattern((ANY, B, A), False, 2.0)),
    ],
)
def test_length_then_tokens_then_value_decide(pattern, longer):
    assert max([longer, pattern], key=lambda each: each.specificity) is longer


# ---- the published algorithm on the examples of its own test, in our words


def positions(patterns, tokens):
    return [walk_trie(build_trie(patterns), tokens[: i + 1]) for i in range(len(tokens))]


def test_the_greedy_trie_finds_the_first_position():
    explanation = [TokenPattern((ANY,), True, 1.0)]
    assert positions(explanation, [A, B, C]) == [1, 0, 0]
    assert positions(explanation, [C, B, A]) == [1, 0, 0]


def test_the_greedy_trie_finds_a_token():
    assert positions([TokenPattern((C,), False, 1.0)], [C, B, C]) == [1, 0, 1]
    assert positions([TokenPattern((C,), False, 1.0)], [A, A, A]) == [0, 0, 0]


def test_the_greedy_trie_finds_a_token_before_another_but_not_across_a_token_it_knows():
    explanation = [TokenPattern((A, ANY, C), False, 1.0), TokenPattern((A, C), False, 1.0)]
    assert positions(explanation, [B, C]) == [0, 0]
    assert positions(explanation, [A, C]) == [0, 1]
    assert positions(explanation, [A, E, C, A, C]) == [0, 0, 1, 0, 1]
    assert positions(explanation, [A, B, B, C]) == [0, 0, 0, 0]


def test_the_greedy_table_is_the_greedy_trie():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 3, (4, 9))
    explanations = {
        latent: [
            TokenPattern(
                tuple(generator.choice([ANY, 0, 1, 2], generator.integers(1, 4)).tolist()),
                bool(generator.integers(2)),
                1.0 + i,
            )
            for i in range(5)
        ]
        for latent in range(6)
    }
    matches = GreedyMatcher(explanations).match(tokens, tokens < 0, np.ones(tokens.shape, bool))
    for latent, patterns in explanations.items():
        expected = np.array([positions(patterns, row) for row in tokens.tolist()])
        np.testing.assert_array_equal(dense(matches, tokens.shape, latent), expected)
