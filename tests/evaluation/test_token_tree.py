"""Trees of token sequences: every token sees its own sequence and no other, and nothing is there twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm_pro.evaluation.token_tree import token_trees, tree_masks
from mobilellm_pro.model.row_shard import Span

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(1, 30), st.integers(1, 4), st.sampled_from([None, 1, 6]))
def test_a_token_sees_its_own_sequence(
    sequences: list[list[int]], max_tokens: int, window: int, enough_tokens: int | None
):
    counts = [1 + number % len(sequence) for number, sequence in enumerate(sequences)]
    seen = []
    for tree in token_trees(sequences, counts, max_tokens, enough_tokens=enough_tokens):
        assert len(tree.tokens) <= max_tokens or len(tree.paths) == 1
        spans = {"global": Span(), "local": Span(window=window)}
        masks = tree_masks(torch.tensor(tree.depths), torch.tensor(tree.ends), spans)
        visible = {kind: mask.dense[0, 0] for kind, mask in masks.items() if mask.dense is not None}
        for number, path in tree.paths.items():
            sequence, first = sequences[number], len(sequences[number]) - counts[number]
            assert len(path) == counts[number]
            for place, node in enumerate(path, first):
                assert [tree.tokens[i] for i in visible["global"][node].nonzero().flatten()] == sequence[: place + 1]
                near = [tree.tokens[i] for i in visible["local"][node].nonzero().flatten()]
                assert near == sequence[max(0, place + 1 - window) : place + 1]
                assert tree.depths[node] == place
        prefixes = {tuple(sequences[n][: d + 1]) for n in tree.paths for d in range(len(sequences[n]))}
        assert len(tree.tokens) == len(prefixes)
        seen += tree.paths
    assert sorted(seen) == list(range(len(sequences)))


def test_only_the_sequences_that_were_asked_for():
    (tree,) = token_trees([[1, 2, 3], [1, 2], [1, 5]], [2, 1, 1], 100, order=[2, 0])
    assert tree.tokens == [1, 2, 3, 5]
    assert tree.paths == {0: [1, 2], 2: [3]}
    assert tree.ends == [4, 3, 3, 4]
