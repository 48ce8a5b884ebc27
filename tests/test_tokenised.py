"""Activations of rows that are tokenised already, against one plain forward pass a row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import MAX_POSITIONS, tiny_model

from sae_core.errors import UserError
from sae_core.tokenised import TokenisedRow, stream_kept

POINTS = ["layers.1.out", "model.layers.2.mlp.down_proj.in"]
# Activations of one token differ by rounding between batches of different width.
ROUNDING = 1e-4


def rows_of(lengths: list[int], seed: int = 0) -> list[TokenisedRow]:
    rng = np.random.default_rng(seed)
    rows = [
        TokenisedRow(rng.integers(0, 500, size=n), rng.random(n) < 0.5 if n else np.empty(0, bool))
        for n in lengths
    ]
    rows[1].keep[:] = False
    rows[2].keep[:] = True  # the first token and special tokens too
    rows[2].ids[:2] = [1, 2]
    return rows


def collected(lm, rows, **settings) -> dict[str, dict[tuple[int, int], np.ndarray]]:
    found: dict[str, dict[tuple[int, int], np.ndarray]] = {name: {} for name in POINTS}
    for batch in stream_kept(lm, rows, POINTS, context_size=40, **settings):
        for name, one in batch.items():
            for x, row, position in zip(one.x, one.row_id, one.position, strict=True):
                found[name][int(row), int(position)] = x.numpy()
    return found


@pytest.mark.parametrize(
    "settings", [{}, {"batch_tokens": 1}, {"batch_tokens": 90, "window_rows": 2}]
)
def test_kept_tokens_are_those_of_a_pass_of_the_row_alone(tiny_lm, settings) -> None:
    rows = rows_of([7, 5, 9, 40, 1, 0, 12])
    found = collected(tiny_lm, rows, **settings)
    wanted = {(i, j) for i, row in enumerate(rows) for j in np.flatnonzero(row.keep)}
    assert set(found[POINTS[0]]) == set(found[POINTS[1]]) == wanted
    assert (2, 0) in wanted and (2, 1) in wanted, "control: the first token, a special token"
    for i, row in enumerate(rows):
        if not row.keep.any():
            continue
        inner: list[torch.Tensor] = []
        module = tiny_lm.model.model.layers[2].mlp.down_proj
        handle = module.register_forward_pre_hook(lambda _, args, to=inner: to.append(args[0]))
        with torch.no_grad():
            ids = torch.from_numpy(row.ids)[None]
            hidden = tiny_lm.model(ids, output_hidden_states=True).hidden_states[2][0]
        handle.remove()
        for j in np.flatnonzero(row.keep).tolist():
            for name, values in zip(POINTS, (hidden, inner[0][0]), strict=True):
                np.testing.assert_allclose(found[name][i, j], values[j], atol=ROUNDING)


def test_rows_do_not_see_each_other(tiny_lm) -> None:
    rows = rows_of([6, 4, 8])
    other = [*rows[:2], TokenisedRow(rows[2].ids[::-1].copy(), rows[2].keep)]
    before, after = collected(tiny_lm, rows)[POINTS[0]], collected(tiny_lm, other)[POINTS[0]]
    same = {at for at in before if np.allclose(before[at], after[at], atol=ROUNDING)}
    assert same >= {at for at in before if at[0] == 0} != set()
    assert not same & {at for at in before if at[0] == 2}, "control: the changed row differs"


def test_nothing_kept_is_no_batch_and_bad_rows_are_refused(tiny_lm) -> None:
    silent = [TokenisedRow(np.arange(5), np.zeros(5, dtype=bool))]
    assert list(stream_kept(tiny_lm, silent, POINTS, context_size=8)) == []
    assert list(stream_kept(tiny_lm, [], POINTS, context_size=8)) == []
    long = [*silent, TokenisedRow(np.arange(9), np.ones(9, dtype=bool))]
    with pytest.raises(UserError, match="at most 8 tokens, got 9 in row 1"):
        next(stream_kept(tiny_lm, long, POINTS, context_size=8))
    uneven = [TokenisedRow(np.arange(5), np.ones(4, dtype=bool))]
    with pytest.raises(UserError, match="each of the 5 tokens of row 0, got 4"):
        next(stream_kept(tiny_lm, uneven, POINTS, context_size=8))
    bounded = replace(tiny_lm, model=tiny_model("gpt2"))
    with pytest.raises(UserError, match=f"at most the model's {MAX_POSITIONS} positions"):
        next(stream_kept(bounded, [TokenisedRow(np.arange(5), np.ones(5, dtype=bool))],
                         ["layers.1.out"], context_size=MAX_POSITIONS + 1))  # fmt: skip
