"""Weighted min-hash codes: unbiased, stable, and refused where they mean nothing."""

import numpy as np
import pytest
from scipy import sparse

from sae_apps.selection.sketch import WeightedMinHash
from sae_core.errors import UserError

pytest.importorskip("numba")

D_SAE, N_BITS, SEEDS = 300, 512, 60
Z = 4.5  # standard errors; the seeds are fixed, so this fails for a reason only


def csr(dense: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array(dense.astype(np.float32))


def random_rows(n: int, seed: int, density: float = 0.2) -> sparse.csr_array:
    rng = np.random.default_rng(seed)
    values = rng.lognormal(size=(n, D_SAE)) * (rng.random((n, D_SAE)) < density)
    return csr(values / values.sum(1, keepdims=True).clip(1e-9))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return np.minimum(a, b).sum() / np.maximum(a, b).sum()


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Pairs from alike to unlike; some differ in their norm alone, some share half of each."""
    a = random_rows(6, 1).toarray()
    other = random_rows(6, 2).toarray()
    b = np.stack([
        a[0], a[1] * 0.5, a[2] * 0.9 + other[2] * 0.1, a[3] * 0.5 + other[3] * 0.5, other[4],
        a[5] * 0.05,
    ])  # fmt: skip
    return a, b


def errors(a: np.ndarray, b: np.ndarray, norm: float) -> tuple[np.ndarray, np.ndarray]:
    """Estimates [seeds, pairs], and the truth."""
    found = []
    for seed in range(SEEDS):
        hasher = WeightedMinHash(D_SAE, N_BITS, seed, norm)
        found.append(np.diag(hasher.estimate(hasher.codes(csr(a)), hasher.codes(csr(b)))))
    return np.array(found), np.array([jaccard(x, y) for x, y in zip(a, b, strict=True)])


def icws(row: np.ndarray, n_samples: int, seed: int) -> np.ndarray:
    """Ioffe's consistent weighted sampling, word for word and slow: (latent, t) of each sample."""
    rng = np.random.default_rng(seed)
    r = rng.gamma(2, size=(n_samples, D_SAE))
    c = rng.gamma(2, size=(n_samples, D_SAE))
    beta = rng.random((n_samples, D_SAE))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.floor(np.log(row) / r + beta)
        score = np.where(row > 0, c / (np.exp(r * (t - beta)) * np.exp(r)), np.inf)
    latent = score.argmin(1)
    return np.stack([latent, t[np.arange(n_samples), latent]], axis=1)


# ---- the estimate ----


@pytest.mark.parametrize("norm", [1.0, 16.0, 0.25])
def test_estimate_is_unbiased_whatever_the_norm(norm: float) -> None:
    a, b = pairs()
    found, truth = errors(a, b, norm)
    stated = np.array([WeightedMinHash(D_SAE, N_BITS).standard_error(j) for j in truth])
    own = np.maximum(found.std(0, ddof=1), stated) / SEEDS**0.5
    assert (np.abs(found.mean(0) - truth) <= Z * own + 1e-12).all()


def test_standard_error_is_the_spread_over_seeds() -> None:
    a, b = pairs()
    found, truth = errors(a[1:5], b[1:5], 1.0)
    stated = np.array([WeightedMinHash(D_SAE, N_BITS).standard_error(j) for j in truth])
    ratio = np.sqrt((((found - truth) / stated) ** 2).mean())
    # 240 deviations: their root mean square is known to 5%; a doubled or halved error is far off
    assert 0.85 < ratio < 1.15
    assert WeightedMinHash(D_SAE, 4 * N_BITS).standard_error(0.3) == pytest.approx(
        WeightedMinHash(D_SAE, N_BITS).standard_error(0.3) / 2
    )


def test_collisions_are_those_of_consistent_weighted_sampling() -> None:
    a, b = pairs()
    samples = 4000
    for x, y in zip(a[2:5], b[2:5], strict=True):
        slow = (icws(x, samples, 3) == icws(y, samples, 3)).all(1).mean()
        hasher = WeightedMinHash(D_SAE, 8192)
        fast = hasher.estimate(hasher.codes(csr(x[None])), hasher.codes(csr(y[None])))[0, 0]
        error = np.hypot(hasher.standard_error(slow), np.sqrt(slow * (1 - slow) / samples))
        assert abs(slow - fast) <= Z * error


def test_unlike_bits_are_halved() -> None:
    """Rows without a common latent agree in half of the bits: the code is one bit, not the dart."""
    left, right = np.zeros((2, D_SAE))
    left[:50], right[50:100] = 0.02, 0.02
    hasher = WeightedMinHash(D_SAE, 8192)
    found = hasher.estimate(hasher.codes(csr(left[None])), hasher.codes(csr(right[None])))[0, 0]
    assert abs(found) <= Z * hasher.standard_error(0)


# ---- stability ----


def test_codes_do_not_depend_on_blocks_or_order() -> None:
    rows = random_rows(700, 4)
    whole = WeightedMinHash(D_SAE, 256).codes(rows)
    order = np.random.default_rng(5).permutation(700)
    shuffled = WeightedMinHash(D_SAE, 256).codes(rows[order])
    assert (shuffled == whole[order]).all()
    one = WeightedMinHash(D_SAE, 256)
    assert (np.concatenate([one.codes(rows[i : i + 50]) for i in range(0, 700, 50)]) == whole).all()


def test_codes_do_not_depend_on_the_rows_seen_first() -> None:
    """Tables are filled from the first rows; larger weights later are made anew, many at once."""
    rows = random_rows(40, 6)
    fresh = WeightedMinHash(D_SAE, 4096).codes(rows)
    primed = WeightedMinHash(D_SAE, 4096)
    primed.codes(csr(random_rows(3, 7).toarray() * 1e-3))
    assert (primed.codes(rows) == fresh).all()


def test_seed_decides_the_codes() -> None:
    rows = random_rows(20, 8)
    a, b, c = (WeightedMinHash(D_SAE, 256, seed).codes(rows) for seed in (3, 3, 4))
    assert (a == b).all()
    assert (a != c).any(axis=1).all()


def test_indices_of_64_bits_give_the_same_codes() -> None:
    rows = random_rows(10, 9)
    wide = sparse.csr_array(
        (rows.data, rows.indices.astype(np.int64), rows.indptr.astype(np.int64)), shape=rows.shape
    )
    hasher = WeightedMinHash(D_SAE, 256)
    assert (hasher.codes(wide) == hasher.codes(rows)).all()


def test_empty_rows_have_empty_codes() -> None:
    rows = csr(np.vstack([np.zeros(D_SAE), random_rows(1, 10).toarray()]))
    codes = WeightedMinHash(D_SAE, 256).codes(rows)
    assert not codes[0].any() and codes[1].any()
    assert WeightedMinHash(D_SAE, 256).codes(csr(np.zeros((2, D_SAE)))).sum() == 0


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bits": 12}, "multiple of 8 between 8 and 65536, got 12"),
        ({"n_bits": 0}, "got 0"),
        ({"norm": 0.0}, "norm above 0, got 0"),
        ({"norm": float("nan")}, "norm above 0, got nan"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedMinHash(D_SAE, **settings)


def test_bad_rows_are_refused() -> None:
    hasher = WeightedMinHash(D_SAE, 64)
    with pytest.raises(UserError, match=r"d_sae 300, got 299"):
        hasher.codes(csr(np.ones((1, 299))))
    with pytest.raises(UserError, match=r"up to 1000 times the norm 1, got 3e\+06 in line 1"):
        hasher.codes(csr(np.vstack([np.ones(D_SAE), np.full(D_SAE, 1e4)])))
    with pytest.raises(UserError, match="at least 0"):
        hasher.codes(csr(-np.ones((1, D_SAE))))
