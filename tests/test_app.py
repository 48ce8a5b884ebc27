"""Fitting from labelled texts and suppressing: on a real small model and on planted values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_apps.suppression import fit as fit_module
from sae_apps.suppression.app import App, load_app, save_app
from sae_apps.suppression.bins import bin_of
from sae_apps.suppression.calibration import CalibrationSums, calibration_of, class_weights
from sae_apps.suppression.choice import separation
from sae_apps.suppression.fit import Fit, FitConfig, _train_texts, fit_app, fit_report
from sae_apps.suppression.posterior import log_odds
from sae_apps.suppression.reader import read_latents
from sae_apps.suppression.suppress import suppress
from sae_apps.suppression.tokens import TokenValues, histogram_of
from sae_apps.suppression.units import open_units
from sae_core.errors import CorruptFileError, UserError
from sae_core.models import LanguageModel
from sae_core.sae import SAE, SAEConfig, save_sae
from tests.tiny_models import mirror_sae

POINT = "layers.3.out"
NAMES = ("Lily", "Tom", "Sue", "Ben", "Mia", "Tim", "Sam", "Anna")
PLACES = ("park", "sea", "hill", "shop", "zoo", "farm")
PAIRS = [(name, place) for name in NAMES for place in PLACES]
SAD = [f"{a} was sad at the {b}. {a} cried and cried." for a, b in PAIRS]
HAPPY = [f"{a} was happy at the {b}. {a} smiled and laughed." for a, b in PAIRS]
NEUTRAL = [f"{a} went to the {b}. {a} saw a big tree." for a, b in PAIRS]
TEXTS, LABELS = SAD + HAPPY, ["sad"] * len(SAD) + ["happy"] * len(HAPPY)
QUICK = FitConfig(permutations=30)
ROUNDING = 1e-4  # float32 sums over 64 dimensions in another order


def sae_of(kind: Any = "relu", **more: Any) -> SAE:
    """A random SAE whose b_dec is the origin; reading and writing need no trained one."""
    config = SAEConfig(64, 256, kind, **more)
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-0.2, 0.05, 256))
        sae.b_dec.copy_(torch.linspace(-0.05, 0.05, 64))
        sae.scale.mul_(0.8 if kind == "gba" else 1.0)
        sae.threshold.fill_(0.1)
    return sae.eval()


@pytest.fixture(scope="module")
def fit(tiny_lm: LanguageModel) -> Fit:
    return fit_report(
        tiny_lm, None, TEXTS, LABELS, "sad", NEUTRAL,
        hook_point=POINT, kind="residual", config=QUICK,
    )  # fmt: skip


def loss(lm: LanguageModel, start: str, end: str) -> float:
    """Mean negative log-likelihood of the end behind the start."""
    head = lm.tokenizer(start, return_tensors="pt")["input_ids"]
    ids = lm.tokenizer(start + end, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = lm.model(ids).logits[0, head.shape[1] - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, head.shape[1] :]))


def rise(lm: LanguageModel, app: App, strength: float, start: str, end: str) -> float:
    plain = loss(lm, start, end)
    with suppress(lm, app, strength=strength):
        return loss(lm, start, end) - plain


# --- reading and writing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gba", {}),
        ("gba", {"gate": "relu", "tied": True}),
        ("relu", {"normalize": "none"}),
        ("jumprelu", {}),
        ("batch_topk", {"k": 20}),
        ("topk", {"k": 60}),
    ],
)
def test_chosen_latents_read_as_the_whole_sae(kind: str, more: dict[str, Any]) -> None:
    sae = sae_of(kind, **more)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * 3
    chosen = torch.tensor([200, 120, 177, 255, 150])
    reader = read_latents(sae, chosen)
    whole = sae.encode(x)
    assert whole[:, chosen].any(dim=0).all()  # each of them fires somewhere
    torch.testing.assert_close(reader.values(x), whole[:, chosen], atol=ROUNDING, rtol=ROUNDING)
    without = whole.clone()
    without[:, chosen] = 0
    norm = x.norm(dim=1, keepdim=True) if sae.config.normalize == "token" else 1
    expected = x + (sae.decode(without) - sae.decode(whole)) * norm
    got = reader.subtract(x, whole[:, chosen])
    torch.testing.assert_close(got, expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("kind", ["residual", "neurons"])
def test_base_units_are_written_in_place(tiny_lm: LanguageModel, kind: str) -> None:
    units = open_units(tiny_lm, hook_point=POINT, kind=kind).take(torch.tensor([5, 2]))
    assert units.d_in == (64 if kind == "residual" else 172)
    x = torch.randn(4, units.d_in, generator=torch.Generator().manual_seed(0))
    old = units.values(x)
    assert isinstance(old, torch.Tensor)
    new = units.write(x, old, torch.zeros_like(old))
    assert torch.equal(old, x[:, [5, 2]])
    assert not new[:, [2, 5]].any()
    rest = [j for j in range(units.d_in) if j not in (2, 5)]
    assert torch.equal(new[:, rest], x[:, rest])


# --- the edit ---------------------------------------------------------------------------------


def app_of(lm: LanguageModel, **more: Any) -> App:
    """Four latents with made-up tables; the last is told nothing about."""
    units = open_units(lm, sae_of(), POINT).take(torch.tensor([250, 240, 230, 220]))
    weights = torch.tensor([[0, 0.2, 0.9], [0, 0.0, 0.5], [0, 1.0, 1.0], [0, 0, 0]])
    edges = torch.full((4, 1), 0.15)
    return App(units, edges, weights, weights * 3, torch.zeros(4), 0.5, ("sad",), **more)


def values_after(app: App, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values before and those that are written."""
    a = app.units.values(x)
    assert isinstance(a, torch.Tensor)
    seen = []
    reader = app.units.reader
    assert reader is not None
    written = torch.linalg.lstsq(reader.decoder.T, ((x - app.apply(x)) / x.norm(dim=1)[:, None]).T)
    seen.append(a - written.solution.T)
    return a, seen[0]


def test_the_edit_is_the_table(tiny_lm: LanguageModel) -> None:
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(2))
    app = app_of(tiny_lm)
    a, after = values_after(app, x)
    unit = torch.arange(4).expand_as(a)
    place = bin_of(a.flatten(), unit.flatten(), app.edges)
    w = app.weights[unit.flatten(), place].view_as(a)
    torch.testing.assert_close(after, a * (1 - w), atol=ROUNDING, rtol=ROUNDING)
    assert (a == 0).any() and (w > 0).any()
    assert not app.weight(a)[a == 0].any()  # zero stays zero
    assert not app.weight(a)[:, 3].any()


def test_removal_grows_with_strength_and_clip_stops_at_zero(tiny_lm: LanguageModel) -> None:
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(2))
    over, clip = app_of(tiny_lm), app_of(tiny_lm, beyond="clip")
    left = [values_after(replace(over, strength=s), x)[1].sum() for s in (0.5, 1.0, 2.0, 4.0)]
    assert all(b < a for a, b in zip(left, left[1:], strict=False))
    assert values_after(replace(over, strength=4.0), x)[1].min() < -0.1
    assert values_after(replace(clip, strength=4.0), x)[1].min() > -ROUNDING
    assert torch.equal(over.apply(x), clip.apply(x))


def test_the_joint_gate_has_one_weight_for_a_token(tiny_lm: LanguageModel) -> None:
    x = torch.randn(60, 64, generator=torch.Generator().manual_seed(2))
    app = app_of(tiny_lm, gate="joint")
    a = app.units.values(x)
    assert isinstance(a, torch.Tensor)
    w = app.weight(a)
    assert (w == w[:, :1]).all()
    total = torch.stack(
        [app.evidence[j][bin_of(a[:, j], torch.full((60,), j), app.edges)] for j in range(4)]
    ).sum(dim=0)
    expected = (2 * torch.sigmoid(total) - 1).clamp_min(0)
    torch.testing.assert_close(w[:, 0], expected)


def test_no_units_is_the_plain_model(tiny_lm: LanguageModel) -> None:
    config = replace(QUICK, n_units=0)
    app = fit_app(tiny_lm, mirror_sae(), TEXTS, LABELS, "sad", hook_point=POINT, config=config)
    ids = tiny_lm.tokenizer(SAD[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        plain = tiny_lm.model(ids).logits
        with suppress(tiny_lm, app, strength=5.0):
            assert torch.equal(tiny_lm.model(ids).logits, plain)


# --- a trained model --------------------------------------------------------------------------


def test_a_trained_model_loses_the_concept_and_keeps_the_control(
    tiny_lm: LanguageModel, fit: Fit
) -> None:
    """Behind a sad beginning a sad end gets less likely, more so than neutral text."""
    sad = ("Kim was sad at the farm. Kim ", "cried and cried.")
    control = ("Kim went to the farm. Kim ", "saw a big tree.")
    assert fit.app.units.n_units > 4
    rises = [rise(tiny_lm, fit.app, s, *sad) for s in (0.0, 1.0, 3.0)]
    assert rises[0] == 0 < rises[1] < rises[2]
    assert rises[2] > 3 * abs(rise(tiny_lm, fit.app, 3.0, *control))


def test_five_lines_with_the_folder_of_an_sae(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    save_sae(tmp_path / "sae", mirror_sae(), {"hook_point": POINT, "model_id": tiny_lm.model_id})
    app = fit_app(tiny_lm, tmp_path / "sae", TEXTS, LABELS, ["sad"], NEUTRAL, config=QUICK)
    assert app.hook_point == POINT and app.units.n_units > 4
    start = ("Kim was sad at the farm. Kim ", "cried and cried.")
    assert 0 < rise(tiny_lm, app, 1.0, *start) < rise(tiny_lm, app, 3.0, *start)
    # logits, not tokens: greedy choices may be nearly tied. A new text: edges of bins are values
    # of the fitted texts, where rounding decides about the bin
    ids = tiny_lm.tokenizer("".join(start), return_tensors="pt")["input_ids"]
    with torch.no_grad(), suppress(tiny_lm.model, app, strength=2.0):
        whole = tiny_lm.model(ids).logits[0]
        cache, steps = None, []
        for i in range(ids.shape[1]):
            out = tiny_lm.model(ids[:, i : i + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits[0, 0])
    torch.testing.assert_close(torch.stack(steps), whole, atol=ROUNDING, rtol=ROUNDING)


def test_posteriors_of_held_out_tokens_beat_the_prior(fit: Fit) -> None:
    quality = fit.calibration
    assert quality is not None
    assert quality.gate_loss < 0.8 * quality.prior_loss
    assert quality.weight.sum() == pytest.approx(1)
    assert fit.n_texts == {"sad": 48, "happy": 48, "background": 48}


def test_the_temperature_is_that_of_the_units_that_stay(
    tiny_lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def spy(blocks: Any, tables: Any, index: np.ndarray, *rest: Any) -> Any:
        found = calibration_of(blocks, tables, index, *rest)
        calls.append((tables, index, found))
        return found

    monkeypatch.setattr(fit_module, "calibration_of", spy)
    rng = np.random.default_rng(0)  # few of the labels say anything
    labels = [one if i % 4 == 0 else str(rng.choice(LABELS)) for i, one in enumerate(LABELS)]
    fit = fit_report(
        tiny_lm, None, TEXTS, labels, "sad", hook_point=POINT, kind="residual",
        config=replace(QUICK, significance=1.0, gate="joint"),
    )  # fmt: skip
    assert fit.dropped > 0 and fit.app.units.n_units > 1, "some go, some stay"
    tables, index, quality = calls[-1]
    assert index.tolist() == fit.app.units.index.tolist()
    evidence = quality.temperature * log_odds(tables, ["sad"])
    np.testing.assert_allclose(fit.app.evidence, evidence, rtol=1e-5)
    assert fit.calibration is not None
    assert fit.calibration.gate_loss == quality.gate_loss
    assert len(fit.calibration.loss) == fit.dropped + fit.app.units.n_units


def test_saved_apps_make_the_same_edit(tiny_lm: LanguageModel, fit: Fit, tmp_path: Path) -> None:
    latents = app_of(tiny_lm, gate="joint", strength=2.0)
    for number, app in enumerate((fit.app, latents)):
        save_app(tmp_path / str(number), app)
        loaded = load_app(tmp_path / str(number))
        x = torch.randn(9, 64, generator=torch.Generator().manual_seed(3))
        assert torch.equal(loaded.apply(x), app.apply(x))
        assert not torch.equal(loaded.apply(x), x)
        assert loaded.concepts == ("sad",)
    (tmp_path / "0" / "app.json").write_text("{}")
    with pytest.raises(CorruptFileError, match=r"app\.json"):
        load_app(tmp_path / "0")


def test_the_same_seed_chooses_the_same_units(tiny_lm: LanguageModel, fit: Fit) -> None:
    def again(seed: int) -> Fit:
        return fit_report(
            tiny_lm, None, TEXTS, LABELS, "sad", NEUTRAL,
            hook_point=POINT, kind="residual", config=replace(QUICK, seed=seed),
        )  # fmt: skip

    assert torch.equal(again(0).app.weights, fit.app.weights)
    assert not np.array_equal(again(1).separation.d_prime, fit.separation.d_prime)


# --- the choice of units and the calibration ---------------------------------------------------


def planted(seed: int, effect: float) -> tuple[TokenValues, np.ndarray]:
    """40 texts of 12 tokens; 20 units fire by text, unit 0 more often in texts of the concept."""
    rng = np.random.default_rng(seed)
    label = np.arange(40) % 2 == 0
    rate = np.clip(rng.beta(1, 2, (40, 20)), 0, 1)
    rate[:, 0] += effect * label
    fires = rng.random((40, 12, 20)) < rate[:, None]
    token, unit = np.nonzero(fires.reshape(-1, 20))
    value = rng.lognormal(size=len(token)).astype(np.float32)
    values = TokenValues(token, unit, value, np.repeat(np.arange(40), 12), 20, True)
    return values, label.astype(int)


def p_values(seed: int, effect: float) -> np.ndarray:
    values, label = planted(seed, effect)
    hist = histogram_of([values], label, ("b", "a"), n_bins=4, seed=0)
    every = np.ones(40, dtype=bool)
    rng = np.random.default_rng(seed)
    return separation([values], hist, label, every, ["a"], permutations=39, rng=rng).p_value


def test_texts_are_what_is_permuted() -> None:
    """Tokens of a text are alike here: permuting tokens would find something in nearly all."""
    false = sum(p_values(seed, 0.0).min() <= 0.05 for seed in range(20))
    assert false <= 4  # one in 20 is expected, five have probability 0.003
    found = p_values(1, 0.6)
    assert found[0] <= 0.05
    assert found[1:].min() > 0.05


def test_many_units_that_know_nothing_pass_in_one_trial_of_twenty() -> None:
    """400 units that fire by text, 60 texts, 39 permutations: with mean and sd of the permutations
    alone 45 of these trials had a unit at p <= 0.05."""

    def lowest(seed: int) -> float:
        rng, label = np.random.default_rng(seed), np.arange(60) % 2
        fires = rng.random((60, 10, 400)) < rng.beta(0.5, 4.5, (60, 1, 400))
        token, unit = np.nonzero(fires.reshape(-1, 400))
        value = rng.lognormal(size=len(token)).astype(np.float32)
        values = TokenValues(token, unit, value, np.repeat(np.arange(60), 10), 400, True)
        hist = histogram_of([values], label, ("b", "a"), n_bins=4, seed=0)
        every = np.ones(60, dtype=bool)
        found = separation([values], hist, label, every, ["a"], permutations=39, rng=rng)
        return float(found.p_value.min())

    false = sum(lowest(seed) <= 0.05 for seed in range(60))
    assert false <= 9  # three are expected, ten have probability 0.001


def test_weights_give_each_class_its_prior() -> None:
    prior = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(class_weights(np.array([3, 1, 2]), prior), [0.2 / 3, 0.3, 0.25])
    np.testing.assert_allclose(class_weights(np.array([3, 1, 0]), prior), [0.4 / 3, 0.6, 0.0])


def test_the_temperature_undoes_repeated_evidence() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(4000) < 0.5
    once = np.where(rng.random(4000) < 0.8, 1, -1) * np.where(truth, 1, -1) * np.log(4)
    sums = CalibrationSums(5, np.array([0.5, 0.5]), np.array([False, True]))
    sums.update(np.repeat(once[:, None], 5, axis=1), truth.astype(int))
    quality = sums.compute()
    assert quality is not None
    assert quality.temperature == pytest.approx(0.2, rel=0.15)
    assert quality.prior_loss == pytest.approx(np.log(2))
    full = quality.weight > 0
    np.testing.assert_allclose(quality.predicted[full], quality.observed[full], atol=0.03)


# --- bad input --------------------------------------------------------------------------------


def test_bad_input_is_refused(tiny_lm: LanguageModel, tmp_path: Path) -> None:
    save_sae(tmp_path / "other", sae_of(), {"hook_point": POINT, "model_id": "gpt2"})
    facts = {"hook_point": "layers.1.out", "model_id": tiny_lm.model_id}
    save_sae(tmp_path / "layer", sae_of(), facts)
    wide = SAE(SAEConfig(32, 64, "relu"))
    far = sae_of("gba", k=64)
    with torch.no_grad():
        far.b_dec.add_(50)  # reconstructs something else
    cases: list[tuple[Any, list[str], list[str], Any, dict[str, Any], str]] = [
        (None, SAD, ["sad"] * 48, "sad", {}, "at least two classes, got sad"),
        (None, TEXTS, LABELS, "angry", {}, "concept of sad, happy, got 'angry'"),
        (None, TEXTS, LABELS[1:], "sad", {}, "got 96 texts and 95 labels"),
        (None, [*SAD, *HAPPY[:9]], ["sad"] * 48 + ["happy"] * 9, "sad", {}, "10 texts .* got 9"),
        (None, TEXTS, LABELS, "sad", {"kind": "heads"}, "kind of units of .* got 'heads'"),
        (None, TEXTS, LABELS, "sad", {"kind": "latents"}, "Expected an SAE .* without"),
        (None, TEXTS, LABELS, "sad", {"hook_point": None}, "Expected the hook point"),
        (wide, TEXTS, LABELS, "sad", {"kind": "latents"}, "width d_in 64 .* got one of 32"),
        (far, TEXTS, LABELS, "sad", {"kind": "latents"}, "FVU below 1"),
        (tmp_path / "other", TEXTS, LABELS, "sad", {"kind": "latents"}, "trained on, gpt2"),
        (tmp_path / "layer", TEXTS, LABELS, "sad", {"kind": "latents"}, r"layers\.1\.out, got"),
    ]
    for sae, texts, labels, concept, more, message in cases:
        settings = {"hook_point": POINT, "kind": "residual"} | more
        with pytest.raises(UserError, match=message):
            fit_app(tiny_lm, sae, texts, labels, concept, config=QUICK, **settings)
    with pytest.raises(UserError, match="held_out_frac above 0"):
        FitConfig(gate="joint", held_out_frac=0)
    with pytest.raises(
        UserError, match=r"at least 19 for a significance of 0.05, got 18: .* 0.053"
    ):
        FitConfig(permutations=18)  # no unit could pass, and the App would be empty
    for least, significance in ((19, 0.05), (99, 0.01), (1, 1.0)):
        assert FitConfig(permutations=least, significance=significance).permutations == least


def test_held_out_texts_keep_their_groups_together() -> None:
    label, groups = np.repeat([0, 1, 2], [40, 40, 20]), [i % 40 for i in range(80)]
    train = _train_texts(label, 0.25, np.random.default_rng(0), groups)  # the last 20: background
    assert (train[:40] == train[40:80]).all()
    assert [int((~train[label == one]).sum()) for one in range(3)] == [10, 10, 5]
    other = _train_texts(label, 0.25, np.random.default_rng(1), groups)
    assert (train != other).any()
    alone = _train_texts(label, 0.25, np.random.default_rng(0), None)
    assert (alone[:40] != alone[40:80]).any()
    assert _train_texts(label, 0.0, np.random.default_rng(0), groups).all()
