"""A gated direction: full where the posterior is sure, nothing where it says no."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sae_apps.suppression.gated import GatedPlane, LinearPosterior, fit_gated
from sae_apps.suppression.rival_fits import fit_direction
from sae_core.errors import UserError

HOOK, D = "layers.2.out", 6


def tokens(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the concept or not, which dimension 0 carries; dimension 1 is large and says nothing."""
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, D)).astype(np.float32)
    x[:, 0] += 8.0 * label
    x[:, 1] += 50
    return x, label


def test_hand_worked() -> None:
    plane = fit_direction(HOOK, *tokens(400, 0))
    axis = torch.zeros(D)
    axis[2] = 1.0
    edit = GatedPlane(LinearPosterior(axis, 0.0), plane)
    x = torch.zeros(3, D)
    x[:, 0] = 5.0
    x[:, 2] = torch.tensor([-30.0, float(np.log(3)), 30.0])  # P = 0, 3/4, 1: excess 0, 1/2, 1
    gone = x - plane.apply(x)
    assert gone[:, 0].min() > 4
    for strength in (1.0, 2.0):
        found = x - replace(edit, strength=strength).apply(x)
        share = torch.tensor([0.0, 0.5, 1.0])[:, None]
        assert torch.allclose(found, strength * share * gone, atol=1e-5)
    literal = replace(edit, gate=LinearPosterior(axis, 0.0, prior=0.0))
    assert torch.allclose((x - literal.apply(x))[1], 0.75 * gone[1], atol=1e-5)


def test_the_concept_goes_and_the_rest_stays() -> None:
    (x, label), (held, truth) = tokens(400, 0), tokens(200, 1)
    plane = fit_direction(HOOK, x, label)
    background = tokens(400, 2)[0][1::2]
    edit, rows = fit_gated(plane, x, label, background), torch.from_numpy(held)
    moved, bare = (one.apply(rows) - rows for one in (edit, plane))
    concept, rest = moved[truth].norm(dim=1), moved[~truth].norm(dim=1)
    assert concept.min() > 1 and concept.mean() > 4
    assert rest.mean() < 0.1 * bare[~truth].norm(dim=1).mean()
    assert torch.equal(replace(edit, strength=0.0).apply(rows), rows)


def test_bad_input_is_refused() -> None:
    x, label = tokens(40, 0)
    plane = fit_direction(HOOK, x, label)
    gate = LinearPosterior(torch.zeros(D), 0.0)
    with pytest.raises(UserError, match=r"a prior in \[0, 1\), got 1"):
        LinearPosterior(torch.zeros(D), 0.0, prior=1.0)
    with pytest.raises(UserError, match="one width, got 5 and 6"):
        GatedPlane(LinearPosterior(torch.zeros(5), 0.0), plane)
    with pytest.raises(UserError, match="strength of at least 0, got -1"):
        GatedPlane(gate, plane, strength=-1)
