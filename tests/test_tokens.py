"""Padding has one home: ragged rows, their columns and sums are what plain Python loops say."""

import numpy as np
import pytest
import torch

from rlhf_gym.tokens import (
    PAD,
    Sequences,
    append,
    continuations,
    join,
    longest_extensions,
    model_ids,
    pad_rows,
    row_lengths,
    row_sums,
    unflatten,
)


@pytest.fixture
def ragged() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of different lengths, one response empty; id 0 is a token."""
    return [[5, 0], [7], [1, 2, 3, 0]], [[0, 9, 8], [], [4]]


def as_sequences(prompts: list[list[int]], responses: list[list[int]]) -> Sequences:
    rows = [p + r for p, r in zip(prompts, responses, strict=True)]
    return Sequences(
        torch.from_numpy(pad_rows(rows, 9)),
        torch.tensor([len(p) for p in prompts]),
        torch.tensor([len(r) for r in responses]),
    )


def test_pad_rows(ragged):
    prompts, _ = ragged
    out = pad_rows(prompts, 6)
    assert out.dtype == np.int64
    assert out.tolist() == [row + [PAD] * (6 - len(row)) for row in prompts]
    assert pad_rows(prompts).shape == (3, 4)
    assert pad_rows([]).shape == (0, 0)
    with pytest.raises(ValueError, match="4 tokens"):
        pad_rows(prompts, 3)


def test_row_lengths_count_the_id_zero(ragged):
    prompts, _ = ragged
    tokens = pad_rows(prompts, 6)
    assert row_lengths(tokens).tolist() == [2, 1, 4]
    assert row_lengths(torch.from_numpy(tokens)).tolist() == [2, 1, 4]


def test_append_writes_behind_each_row_of_a_fresh_copy(ragged):
    prompts, _ = ragged
    tokens = pad_rows(prompts, 5)
    before = tokens.copy()
    out = append(tokens, np.array([11, 0, 13]))
    assert out.tolist() == pad_rows([[5, 0, 11], [7, 0], [1, 2, 3, 0, 13]], 5).tolist()
    assert not np.shares_memory(out, tokens)
    np.testing.assert_array_equal(tokens, before)


def test_join_continues_each_row(ragged):
    prompts, responses = ragged
    left, right = pad_rows(prompts), pad_rows(responses)
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    out = join(left, right)
    assert out.tolist() == pad_rows(whole, left.shape[1] + right.shape[1]).tolist()
    assert left.tolist() == pad_rows(prompts).tolist()


def test_cells_and_chosen_are_row_after_row(ragged):
    prompts, responses = ragged
    sequences = as_sequences(prompts, responses)
    expected = [
        (i, len(p) + t)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True))
        for t in range(len(r))
    ]
    rows, columns = sequences.cells()
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected
    assert sequences.chosen().tolist() == [token for r in responses for token in r]
    assert sequences.width == 5
    assert sequences.rows(torch.tensor([2, 0])).chosen().tolist() == [4, 0, 9, 8]


def test_continuations(ragged):
    prompts, responses = ragged
    made = continuations(
        torch.from_numpy(pad_rows(prompts, 6)), torch.from_numpy(pad_rows(responses, 3))
    )
    for part, expected in zip(made, as_sequences(prompts, responses), strict=True):
        assert part.dtype == torch.int64
        assert torch.equal(part, expected)


def test_unflatten_and_row_sums(ragged):
    _, responses = ragged
    lengths = torch.tensor([len(r) for r in responses])
    flat = torch.tensor([0.5, -1.0, 2.0, 8.0])
    grid = unflatten(flat, lengths, 4, fill=-7.0)
    assert grid.tolist() == [[0.5, -1.0, 2.0, -7.0], [-7.0] * 4, [8.0, -7.0, -7.0, -7.0]]
    sums = row_sums(flat, lengths)
    assert sums.dtype == torch.float64
    assert sums.tolist() == [1.5, 0.0, 8.0]


def test_row_sums_lose_no_digits():
    flat = torch.tensor([2.0**24, 1.0, 1.0])
    assert row_sums(flat, torch.tensor([3])).tolist() == [2.0**24 + 2]


def test_model_ids_are_embeddable_and_fresh():
    tokens = torch.tensor([[4, 0, PAD]])
    assert model_ids(tokens).tolist() == [[4, 0, 0]]
    assert tokens.tolist() == [[4, 0, PAD]]


def test_holders_begin_with_their_rows_and_are_no_others_beginning():
    rng = np.random.default_rng(0)
    for _ in range(50):
        width = int(rng.integers(1, 6))
        rows = pad_rows(
            [rng.integers(0, 2, size=int(rng.integers(1, width + 1))) for _ in range(12)], width
        )
        lengths = row_lengths(rows)

        def begins(i: int, j: int, rows=rows, lengths=lengths) -> bool:
            return bool((rows[i, : lengths[i]] == rows[j, : lengths[i]]).all())

        held = longest_extensions(rows)
        for i, j in enumerate(held):
            assert begins(i, j)
            assert all(lengths[k] <= lengths[j] for k in range(12) if begins(j, k))
        # Equal rows have one holder.
        assert len({rows[j].tobytes() for j in held}) == len(set(held.tolist()))
