"""The rivals do what their formulas say, worked by hand on planted activations."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from sae_apps.suppression.lineup import TokenSample, fit_rivals, instruction, sample_values
from sae_apps.suppression.probes import balanced_accuracy, fit_probe
from sae_apps.suppression.rival_fits import (
    auroc,
    choose_units,
    fit_aura,
    fit_direction,
    fit_leace,
    fit_mask,
    fit_range,
    moments,
    random_units,
)
from sae_apps.suppression.rivals import PromptEdit, at_strength
from sae_apps.suppression.units import Units
from sae_core.errors import MissingExtraError, UserError
from sae_core.sae import SAE, SAEConfig

FLOAT32 = 1e-5  # a dozen float32 operations on values of order 1
HOOK = "layers.0.out"

# rows: three of the rest, then three of the concept; columns: units
VALUES = np.array(
    [[0, 1, 5], [1, 1, 5], [2, 4, 5], [4, 0, 5], [6, 1, 5], [8, 0, 6]], dtype=np.float64
)
LABEL = np.array([False, False, False, True, True, True])


def residual(d: int) -> Units:
    return Units("residual", HOOK, d, d, "none", "none")


def latents(d_in: int = 6, d_sae: int = 8, normalize: str = "token") -> Units:
    generator = torch.Generator().manual_seed(0)
    sae = SAE(
        SAEConfig(d_in, d_sae, kind="relu", normalize=normalize),  # pyright: ignore
        generator=generator,
    ).eval()
    return Units("latents", HOOK, d_sae, d_in, "none", "none", sae, "hash")


def planted(n: int = 400, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2 == 0
    x = rng.normal(size=(n, d))
    x[:, 0] += 3.0 * label
    x[:, 1] += 2.0 * label + 1.0
    return x.astype(np.float32), label


# ---- statistics ----


def test_moments_by_hand() -> None:
    stats = moments(VALUES, LABEL)
    assert np.allclose(stats.mean, [[1, 2, 5], [6, 1 / 3, 16 / 3]])
    assert np.allclose(stats.var, [[2 / 3, 2, 0], [8 / 3, 2 / 9, 2 / 9]])
    assert np.allclose(stats.mean_positive, [6, 1, 16 / 3])
    assert np.allclose(stats.sd_positive, [np.sqrt(8 / 3), 0, np.sqrt(2 / 9)])
    assert np.allclose(stats.d_prime, [5 / np.sqrt(5 / 3), -5 / 3 / np.sqrt(10 / 9), 1])


def test_moments_of_sparse_values_equal_those_of_dense_ones() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(50, 7)) * (rng.random((50, 7)) < 0.3)
    label = rng.random(50) < 0.4
    stats = moments(sparse.csr_array(dense), label)
    for row, part in enumerate((dense[~label], dense[label])):
        assert np.allclose(stats.mean[row], part.mean(axis=0))
        assert np.allclose(stats.var[row], part.var(axis=0))
        assert np.allclose(stats.mean_abs[row], np.abs(part).mean(axis=0))


def test_moments_keep_digits_under_a_large_offset() -> None:
    values = VALUES + 1e8
    assert np.allclose(moments(values, LABEL).var, moments(VALUES, LABEL).var, rtol=1e-6)


def test_a_constant_unit_has_no_separation() -> None:
    assert moments(np.ones((6, 1)), LABEL).d_prime.tolist() == [0.0]


def test_auroc_by_hand_and_against_scikit_learn() -> None:
    assert np.allclose(auroc(VALUES, LABEL), [1.0, 1 / 9, 2 / 3])
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(1)
    values = np.round(rng.normal(size=(60, 4)), 1) * (rng.random((60, 4)) < 0.5)
    label = rng.random(60) < 0.3
    expected = [roc_auc_score(label, values[:, j]) for j in range(4)]
    assert np.allclose(auroc(sparse.csr_array(values), label), expected)


def test_units_are_chosen_by_size_or_by_separation() -> None:
    stats = moments(VALUES, LABEL)
    assert choose_units(stats, 2, "mean_abs").tolist() == [0, 2]
    assert choose_units(stats, 2, "d_prime").tolist() == [0, 2]
    assert choose_units(stats, 2, "d_prime", two_sided=True).tolist() == [0, 1]


# ---- gates ----


def test_full_masking_zeroes_the_chosen_units_alone() -> None:
    edit = fit_mask(residual(3), moments(VALUES, LABEL), np.array([2, 0]))
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert edit.apply(x).tolist() == [[0.0, -2.0, 0.0]]
    assert at_strength(edit, 0.5).apply(x).tolist() == [[0.5, -2.0, 1.5]]
    assert at_strength(edit, 2.0).apply(x).tolist() == [[-1.0, -2.0, -3.0]]


def test_masking_can_draw_to_the_mean_of_the_rest() -> None:
    edit = fit_mask(residual(3), moments(VALUES, LABEL), np.array([1]), to_rest=True)
    assert edit.apply(torch.tensor([[1.0, -2.0, 3.0]])).tolist() == [[1.0, 2.0, 3.0]]


def test_a_range_takes_what_lies_in_it_and_leaves_the_rest() -> None:
    # unit 0 of the concept: mean 6, sd sqrt(8/3) = 1.633; at tau 2: 2.734 .. 9.266
    edit = fit_range(residual(3), moments(VALUES, LABEL), np.array([0]))
    x = torch.tensor([[2.7, 1.0, 1.0], [2.8, 1.0, 1.0], [9.2, 1.0, 1.0], [9.3, 1.0, 1.0]])
    assert torch.allclose(edit.apply(x)[:, 0], torch.tensor([2.7, 0.0, 0.0, 9.3]))
    assert torch.equal(edit.apply(x)[:, 1:], x[:, 1:])


def test_the_range_of_positives_leaves_out_zeros() -> None:
    # unit 1 of the concept: all values 0, 1, 0: 1/3 +- 2 * 0.471; positives: 1 +- 0
    stats = moments(VALUES, LABEL)
    x = torch.tensor([[0.0, 0.5, 0.0], [0.0, 1.0, 0.0]])
    whole = fit_range(residual(3), stats, np.array([1])).apply(x)[:, 1]
    positive = fit_range(residual(3), stats, np.array([1]), positives=True).apply(x)[:, 1]
    assert whole.tolist() == [0.0, 0.0]
    assert positive.tolist() == [0.5, 0.0]


def test_aura_damps_by_a_constant() -> None:
    # AUROC 1, 1/9, 2/3: alpha 0, 1, 2/3
    edit = fit_aura(residual(3), VALUES, LABEL)
    x = torch.tensor([[3.0, 3.0, 3.0], [-1.0, 1.0, 30.0]])
    expected = torch.tensor([[0.0, 3.0, 2.0], [0.0, 1.0, 20.0]])
    assert torch.allclose(edit.apply(x), expected, atol=FLOAT32)


def test_masking_latents_removes_their_part_of_the_reconstruction() -> None:
    units, x = latents(), torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    assert units.sae is not None
    label = np.arange(20) % 2 == 0
    values = sample_values(units, TokenSample(HOOK, x.numpy(), label))
    chosen = np.array([5, 1])
    edit = fit_mask(units, moments(values, label), chosen)
    removed = torch.from_numpy(sparse.csr_array(values).toarray()[:, chosen])
    expected = x - x.norm(dim=1, keepdim=True) * removed @ units.sae.W_dec[chosen].detach()
    assert bool((removed > 0).any())
    assert torch.allclose(edit.apply(x), expected, atol=FLOAT32)


def test_latents_are_not_switched_on() -> None:
    units, x = latents(), torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    label = np.arange(20) % 2 == 0
    stats = moments(sample_values(units, TokenSample(HOOK, x.numpy(), label)), label)
    with pytest.raises(UserError, match="neutral values of 0 for latents"):
        fit_mask(units, stats, np.array([0, 1, 2, 3]), to_rest=True)


# ---- planes ----


def test_the_direction_of_the_means_is_projected_out() -> None:
    x, label = planted()
    edit = fit_direction(HOOK, x, label)
    gap = x[label].mean(axis=0) - x[~label].mean(axis=0)
    after = edit.apply(torch.from_numpy(x)).numpy()
    assert abs(x @ gap).max() > 1
    assert abs(after @ gap).max() < 1e-4
    half = at_strength(edit, 0.5).apply(torch.from_numpy(x)).numpy()
    assert np.allclose(half, (x + after) / 2, atol=FLOAT32)


def test_a_direction_about_the_rest_keeps_the_rests_part_of_it() -> None:
    x, label = planted()
    after = fit_direction(HOOK, x, label, center="rest").apply(torch.from_numpy(x)).numpy()
    gap = x[label].mean(axis=0) - x[~label].mean(axis=0)
    unit = gap / np.linalg.norm(gap)
    assert np.allclose(after @ unit, x[~label].mean(axis=0) @ unit, atol=1e-4)
    assert np.allclose(after[~label].mean(axis=0), x[~label].mean(axis=0), atol=1e-4)


def test_a_direction_in_the_space_of_latents_leaves_the_others() -> None:
    units, (x, label) = latents(normalize="none"), planted()
    values = sample_values(units, TokenSample(HOOK, x, label))
    chosen = np.array([2, 6, 7])
    edit = fit_direction(HOOK, values, label, units=units, chosen=chosen)
    x_in = torch.from_numpy(x)
    assert edit.units is not None and units.sae is not None
    old = edit.units.values(x_in)
    assert isinstance(old, torch.Tensor)
    d = edit.left
    change = (old @ d @ d.T) @ units.sae.W_dec[chosen].detach()
    assert torch.allclose(edit.apply(x_in), x_in - change, atol=FLOAT32)


def test_after_leace_a_refitted_probe_is_at_chance() -> None:
    pytest.importorskip("concept_erasure")
    x, label = planted(2000)
    before = fit_probe(x, label).is_right(x, label)
    after = fit_leace(HOOK, x, label).apply(torch.from_numpy(x)).numpy()
    assert balanced_accuracy(before, label) > 0.9
    assert balanced_accuracy(fit_probe(after, label).is_right(after, label), label) < 0.55


def test_leace_equals_the_package() -> None:
    package = pytest.importorskip("concept_erasure")
    x, label = planted()
    edit = fit_leace(HOOK, x, label)
    wanted = package.LeaceEraser.fit(
        torch.from_numpy(x).double(), torch.from_numpy(label).double()[:, None]
    )(torch.from_numpy(x).double())
    assert torch.allclose(edit.apply(torch.from_numpy(x)).double(), wanted, atol=1e-4)


def test_without_its_package_leace_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "concept_erasure", None)
    x, label = planted(20)
    with pytest.raises(MissingExtraError, match="rivals"):
        fit_leace(HOOK, x, label)


# ---- control and prompt ----


@pytest.mark.parametrize("strength", [0.5, 1.0, 3.0])
def test_the_control_changes_every_token_by_the_same_norm(strength: float) -> None:
    units, (x, label) = latents(), planted()
    values = sample_values(units, TokenSample(HOOK, x, label))
    reference = fit_mask(units, moments(values, label), np.array([0, 1, 2]))
    live = np.ones(8, dtype=bool)
    live[:3] = False
    control = at_strength(random_units(reference, units, live, 3, seed=0), strength)
    x_in = torch.from_numpy(x)
    wanted = (x_in - at_strength(reference, strength).apply(x_in)).norm(dim=1)
    found = (x_in - control.apply(x_in)).norm(dim=1)
    assert float(wanted.max()) > 0.1
    assert torch.allclose(found, wanted, atol=FLOAT32)


def test_the_control_depends_on_its_seed_alone() -> None:
    units, (x, label) = latents(), planted(40)
    values = sample_values(units, TokenSample(HOOK, x, label))
    reference = fit_mask(units, moments(values, label), np.array([0, 1]))
    live = np.ones(8, dtype=bool)
    a, b, c = (
        random_units(reference, units, live, 4, seed).apply(torch.from_numpy(x))
        for seed in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-2)


def test_an_instruction_is_repeated() -> None:
    edit = instruction("toxic")
    assert "toxic" in edit.prefix
    assert at_strength(edit, 2).prefix == edit.prefix * 2
    assert at_strength(edit, 0).prefix == ""


# ---- all of them ----


def test_at_strength_zero_every_rival_leaves_the_activations_as_they_are() -> None:
    x, label = planted()
    for units in (latents(), residual(6)):
        for name, edit in fit_rivals(units, TokenSample(HOOK, x, label), n_units=3).items():
            x_in = torch.from_numpy(x)
            assert torch.equal(at_strength(edit, 0.0).apply(x_in), x_in), name
            assert not torch.equal(edit.apply(x_in), x_in), name


def test_random_units_are_left_out_where_too_few_are_active() -> None:
    x, label = planted()
    sample = TokenSample(HOOK, x, label)
    assert "random" in fit_rivals(residual(6), sample, n_units=3)
    assert "random" not in fit_rivals(residual(6), sample, n_units=4)
    with pytest.raises(UserError, match="between 1 and 2 random units, got 4"):
        fit_rivals(residual(6), sample, n_units=4, names=["random"])


def test_every_rival_erases_a_planted_concept_and_chance_does_not() -> None:
    x, label = planted(1000)
    x[:, 2:] += 4.0  # constant directions, which an edit in place of the concept would lose
    probe = fit_probe(x, label)
    before = balanced_accuracy(probe.is_right(x, label), label)
    for name, edit in fit_rivals(residual(6), TokenSample(HOOK, x, label), n_units=2).items():
        after = edit.apply(torch.from_numpy(x)).numpy()
        found = balanced_accuracy(probe.is_right(after, label), label)
        if name in ("mask_d", "range_d", "direction", "leace"):
            assert found < 0.65, name
        if name == "random":
            assert np.allclose(after[:, :2], x[:, :2], atol=FLOAT32)
    assert before > 0.9


# ---- bad input ----


def test_bad_input_is_refused() -> None:
    stats, units = moments(VALUES, LABEL), residual(3)
    mask = fit_mask(units, stats, np.array([0]))
    for call, message in (
        (lambda: at_strength(mask, -1.0), "strength of at least 0, got -1"),
        (lambda: at_strength(mask, float("nan")), "strength of at least 0, got nan"),
        (lambda: at_strength(PromptEdit("x"), 0.5), "whole number .* got strength 0.5"),
        (lambda: PromptEdit(""), "got an empty text"),
        (lambda: replace(mask, weight=torch.ones(2)), r"for 1 units, got shape \[2\]"),
        (lambda: choose_units(stats, 4), "between 1 and 3 units, got 4"),
        (lambda: choose_units(stats, 1, "size"), "got 'size'"),  # pyright: ignore
        (lambda: fit_range(units, stats, np.array([0]), tau=0.0), "positive tau, got 0"),
        (lambda: moments(VALUES, np.ones(6, dtype=bool)), "got 6 of the concept and 0 others"),
        (lambda: moments(VALUES, LABEL[:5]), "each of 6 rows, got 5"),
        (lambda: moments(VALUES, LABEL.astype(int)), "boolean label"),
        (lambda: fit_direction(HOOK, np.ones((6, 2)), LABEL), "means that differ"),
        (lambda: fit_direction(HOOK, VALUES, LABEL, units=units), "units and chosen together"),
        (lambda: fit_aura(units, -VALUES[:, :1].repeat(3, 1), LABEL), "above 0.5, got none"),
        (lambda: random_units(mask, units, np.zeros(3, dtype=bool), 1, 0), "between 1 and 0"),
        (lambda: fit_mask(latents(), stats, np.array([9])), "got 9..9"),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_a_sample_of_another_place_is_refused() -> None:
    x, label = planted(10)
    with pytest.raises(UserError, match="sample of layers.0.out, got one of layers.1.out"):
        fit_rivals(residual(6), TokenSample("layers.1.out", x, label), n_units=1)
    with pytest.raises(UserError, match="got 'msk'"):
        fit_rivals(residual(6), TokenSample(HOOK, x, label), n_units=1, names=["msk"])
