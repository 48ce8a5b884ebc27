"""Separability: hand-worked distances, bias taken off, planted separation, honest p-values."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kstest

from sae_apps.suppression.concepts import LabelledTexts
from sae_apps.suppression.histogram import Histogram
from sae_apps.suppression.measure import MeasureConfig, measure
from sae_apps.suppression.permuted import Permuted
from sae_apps.suppression.polysemanticity import polysemanticity
from sae_apps.suppression.separability import js_distance, pairwise, separability
from sae_apps.suppression.separability_table import load_separability
from sae_apps.tasks import separability as command
from sae_apps.tasks.main import main
from sae_core.errors import UserError
from sae_core.store import verify_folder


def histogram(counts: list, classes: tuple[str, ...] = ("a", "b")) -> Histogram:
    """Units by concept by bin."""
    array = np.array(counts, dtype=np.int64)
    u, c, bins = array.shape
    edges, sums = np.ones((u, bins - 2), dtype=np.float32), array[:, :, 1:].sum(axis=2) * 1.0
    return Histogram(array, array[0].sum(axis=1), edges, classes, sums, sums)


def planted(
    n: int, rate: float, k: int = 4, units: int = 60, shift: float = 0.0, seed: int = 0, **options
) -> tuple[Histogram, Permuted]:
    """n tokens a concept, one text each; ``shift`` scales the values of every second unit of the
    last concept."""
    random = np.random.default_rng(seed)
    labels = np.arange(n * k) % k
    fires = random.random((n * k, units)) < rate
    values = np.where(fires, random.lognormal(0, 0.5, (n * k, units)), 0.0).astype(np.float32)
    values[np.ix_(labels == k - 1, np.arange(0, units, 2))] *= 1 + shift
    names = tuple("abcdefgh"[i] for i in labels)
    data = LabelledTexts("planted", tuple(f"text {i}" for i in range(n * k)), names)

    def stream():
        for some in np.array_split(np.arange(n * k), 3):
            yield values[some], some

    return measure(stream, data, units, config=MeasureConfig(**options))


def test_distances_by_hand() -> None:
    same, apart = [[5, 3, 2], [5, 3, 2]], [[10, 0, 0], [0, 6, 4]]
    # f = (1/2, 1/2, 0) and (1, 0, 0): JSD = H(3/4, 1/4) - 1/2
    partly = [[5, 5, 0], [10, 0, 0]]
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    found = js_distance(histogram([same, apart, partly]))
    np.testing.assert_allclose(found, [0, 1, np.sqrt(entropy - 0.5)], atol=1e-12)
    three = histogram([[[4, 0, 0], [0, 4, 0], [0, 0, 4]]], ("a", "b", "c"))
    np.testing.assert_allclose(js_distance(three), [1.0])
    # concepts weigh the same however many tokens they have
    more = histogram([[[5, 5, 0], [100, 0, 0]]])
    np.testing.assert_allclose(js_distance(more), found[2:])


@pytest.mark.parametrize("rate", [1.0, 0.2, 0.02])
def test_identical_concepts_score_near_zero_only_when_debiased(rate: float) -> None:
    for n in (50, 500):
        table = separability(*planted(n, rate))
        raw, debiased = table.column("raw").mean(), table.column("debiased").mean()
        # measured on 40 units, n = 50: raw .300, .328, .132 and debiased .052, .055, .002
        assert raw > (0.08 if n == 50 else 0.05)
        assert debiased < 0.35 * raw
        assert len(table.passing(0.01)) <= 1


def test_a_real_difference_keeps_its_score() -> None:
    table = separability(*planted(500, 0.3, shift=2.0))
    changed = np.arange(0, 60, 2)
    raw, debiased = table.column("raw"), table.column("debiased")
    assert set(table.top(30)) == set(changed) == set(table.passing(0.01))
    assert debiased[changed].mean() > 0.85 * raw[changed].mean()
    assert (table.column("q")[changed] < 1e-6).all()
    assert (table.column("p")[changed] == 1 / 21).all()
    assert set(np.array(table.table["concept"])[changed]) == {"d"}


def test_p_values_are_uniform_where_there_is_nothing() -> None:
    table = separability(*planted(100, 0.2, k=2, units=400, n_permutations=99, n_bins=8))
    # at 400 tests the 0.1% critical distance of Kolmogorov and Smirnov is 0.097
    assert kstest(table.column("p"), "uniform").statistic < 0.097
    assert kstest(table.column("p_tail"), "uniform").statistic < 0.097


def test_texts_not_tokens_are_permuted() -> None:
    # each text speaks of one thing throughout: tokens of a text are alike, concepts are not
    random = np.random.default_rng(0)
    topic = random.random((40, 200)) < 0.3
    item = np.repeat(np.arange(40), 25)
    values = (topic[item] * random.uniform(0.5, 1.5, (1000, 200))).astype(np.float32)
    labels = tuple("ab"[i % 2] for i in range(40))
    texts = LabelledTexts("texts", tuple(f"text {i}" for i in range(40)), labels)
    tokens = LabelledTexts(
        "tokens", tuple(f"token {i}" for i in range(1000)), tuple(labels[i] for i in item)
    )
    config = MeasureConfig(n_permutations=39)
    by_text = separability(*measure(lambda: [(values, item)], texts, 200, config=config))
    wrong = separability(*measure(lambda: [(values, np.arange(1000))], tokens, 200, config=config))
    np.testing.assert_allclose(by_text.column("raw"), wrong.column("raw"))
    assert (by_text.column("p") < 0.05).mean() < 0.1 < 0.3 < (wrong.column("p") < 0.05).mean()
    assert by_text.column("debiased").mean() < 0.5 * wrong.column("debiased").mean()


def test_k_way_of_two_concepts_is_the_pairwise_distance() -> None:
    counts, permuted = planted(200, 0.3, k=2, shift=1.0)
    (pair,) = pairwise(counts, permuted)
    summary = separability(counts, permuted).summary()
    assert (pair["a"], pair["b"]) == ("a", "b")
    assert pair["raw"] == pytest.approx(summary["raw_live"])
    assert pair["debiased"] == pytest.approx(summary["debiased_live"])
    assert pair["best"] == pytest.approx(summary["best"])


def test_pairs_differ_where_the_concepts_do() -> None:
    pairs = {(p["a"], p["b"]): p["debiased"] for p in pairwise(*planted(300, 0.3, shift=2.0))}
    assert len(pairs) == 6
    changed = [value for pair, value in pairs.items() if "d" in pair]
    others = [value for pair, value in pairs.items() if "d" not in pair]
    assert min(changed) > 5 * max(others)


def test_dead_units_count_as_zero_and_are_named() -> None:
    counts, permuted = planted(100, 0.3, units=8)
    quiet = np.array([1, 5])
    counts.counts[quiet] = 0
    counts.counts[quiet, :, 0] = counts.n
    permuted.counts[quiet] = 0
    permuted.counts[quiet, 0] = permuted.n
    table = separability(counts, permuted)
    assert table.column("status")[quiet].tolist() == ["dead", "dead"]
    assert not table.column("raw")[quiet].any() and not table.column("debiased")[quiet].any()
    assert np.isnan(table.column("q")[quiet]).all() and table.table["q"].null_count == 2
    summary = table.summary()
    assert (summary["units"], summary["live"]) == (8, 6)
    assert summary["raw"] == pytest.approx(0.75 * summary["raw_live"])
    assert table.how["n_tests"] == 6


def test_the_stricter_correction_and_other_seeds() -> None:
    counts, permuted = planted(200, 0.3, shift=0.3)
    bh, by = separability(counts, permuted), separability(counts, permuted, "by")
    assert (by.column("q") >= bh.column("q")).all() and (by.column("q") > bh.column("q")).any()
    again, other = planted(200, 0.3, shift=0.3)[1], planted(200, 0.3, shift=0.3, seed=1)[1]
    np.testing.assert_array_equal(permuted.counts, again.counts)
    assert not np.array_equal(permuted.counts, other.counts)


def test_polysemanticity_against_chance() -> None:
    own = np.zeros((30, 3, 3), dtype=np.int64)
    for j in range(30):
        own[j, :, 0] = 100
        own[j, j // 10] = [20, 40, 40]
    found = polysemanticity(histogram(own.tolist(), ("a", "b", "c")), q=10)
    assert found == {"q": 10, "overlap": 0.0, "chance": 1 / 3, "shared": None}
    # every concept fires the first ten most
    common = np.tile([[90, 5, 5]], (30, 3, 1))
    common[:10] = [20, 40, 40]
    assert polysemanticity(histogram(common.tolist(), ("a", "b", "c")), q=10)["overlap"] == 1.0
    with pytest.raises(UserError, match="a live unit"):
        polysemanticity(histogram([[[3, 0, 0], [3, 0, 0]]]), q=10)
    assert polysemanticity(*planted(300, 0.3))["shared"] < 0.05
    assert polysemanticity(*two_of_four())["shared"] > 0.9


def two_of_four() -> tuple[Histogram, Permuted]:
    """Units that fire for two of four concepts."""
    random = np.random.default_rng(0)
    labels = np.arange(800) % 4
    values = random.random((800, 20)) * (
        random.random((800, 20)) < 0.1 + 0.3 * (labels < 2)[:, None]
    )
    data = LabelledTexts(
        "two", tuple(f"t{i}" for i in range(800)), tuple("abcd"[i] for i in labels)
    )
    return measure(lambda: [(values, np.arange(800))], data, 20)


def test_the_table_survives_the_disk(tmp_path) -> None:
    table = separability(*planted(60, 0.3), how={"data": "planted"})
    back = load_separability(table.save(tmp_path / "deep" / "table.parquet"))
    assert back.table.equals(table.table) and back.how == table.how
    assert back.how["data"] == "planted" and back.how["permutations"] == 20
    with pytest.raises(UserError, match="ends in .parquet"):
        table.save(tmp_path / "table.csv")
    with pytest.raises(UserError, match="got nothing"):
        load_separability(tmp_path / "none.parquet")


def test_bad_input() -> None:
    counts, permuted = planted(60, 0.3, k=2)
    with pytest.raises(UserError, match="two concepts, got only 'a'"):
        js_distance(counts.select(["a"]))
    with pytest.raises(UserError, match="got none of 'b'"):
        js_distance(histogram([[[1, 2, 3], [0, 0, 0]]]))
    with pytest.raises(UserError, match="correction bh or by, got 'none'"):
        separability(counts, permuted, "none")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Expected permuted counts of"):
        separability(counts, permuted.select([0]))
    with pytest.raises(UserError, match="at least 2 permutations, got 1"):
        separability(counts, Permuted(permuted.counts[:, :, :1], permuted.n[:1]))
    few = LabelledTexts("few", ("x", "y", "z"), ("a", "a", "b"))
    with pytest.raises(UserError, match="at least 8 texts of 'a', got 2"):
        measure(lambda: [], few, 3)
    one = LabelledTexts("one", ("x",) * 9, ("a",) * 9)
    with pytest.raises(UserError, match="two concepts, got only 'a'"):
        measure(lambda: [], one, 3)
    table = separability(counts, permuted)
    with pytest.raises(UserError, match="p, p_tail or q, got 'raw'"):
        table.passing(by="raw")
    with pytest.raises(UserError, match="k of at least 0"):
        table.top(-1)


# ---- the command ----


@pytest.fixture(scope="module")
def run(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run, and sentences about cats or about storms, two a document."""
    folder = tmp_path_factory.mktemp("separability")
    words = {
        "animals": (["cat", "dog", "bird", "fish"], ["ran", "slept", "ate", "played"]),
        "weather": (["rain", "wind", "snow", "storm"], ["came", "fell", "blew", "stopped"]),
    }
    rows = [
        {"text": f"The {a} and the {b} {verb} today.", "label": label, "doc": f"{label} {a} {b}"}
        for label, (nouns, verbs) in words.items()
        for a in nouns
        for b in nouns
        for verb in verbs[:2]
    ]
    data = folder / "sentences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--model", str(stories260k), "--text", str(data), "--tokens", "600"]
    argv += ["--d-sae", "128", "--k", "8", "--batch-size", "100", "--context-size", "32"]
    argv += ["--eval-tokens", "50", "--loss-tokens", "20", "--quiet"]
    assert main([*argv, "--out", str(folder / "run")]) == 0
    return {"run": str(folder / "run"), "data": str(data), "folder": str(folder)}


def arguments(run: dict[str, str], *more: str) -> list[str]:
    return ["--run", run["run"], "--data", run["data"], "--quiet", "--json", *more]


def test_the_command_measures_every_kind_of_units(run, tmp_path, capsys) -> None:
    kinds = "latents,residual,neurons"
    out = tmp_path / "out"
    argv = arguments(run, "--units", kinds, "--group", "doc", "--out", str(out))
    assert command.main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == {"animals": 32, "weather": 32}
    assert set(verify_folder(out)["files"]) == {
        "summary.json",
        *(f"{k}.parquet" for k in kinds.split(",")),
    }
    for kind, width in (("latents", 128), ("residual", 64), ("neurons", 172)):
        table = load_separability(out / f"{kind}.parquet")
        summary = found["units"][kind]
        assert len(table) == summary["units"] == width
        assert table.how["tokens"] == list(found["tokens"].values())
        assert summary["passing"] == len(table.passing(0.01))
        assert summary["best"] == pytest.approx(table.column("debiased").max())
        assert summary["raw_live"] > summary["debiased_live"] > 0
    # animals and weather are apart in the units of a model that knows both words
    assert found["units"]["residual"]["passing"] > 5
    before = (out / "summary.json").stat().st_mtime_ns
    assert command.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert (out / "summary.json").stat().st_mtime_ns == before
    assert command.main([*argv, "--permutations", "30"]) == 2
    assert "permutations" in capsys.readouterr().err
    assert command.main([*argv, "--permutations", "30", "--overwrite"]) == 0
    assert load_separability(out / "latents.parquet").how["permutations"] == 30


def test_the_estimate_writes_nothing(run, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert command.main(arguments(run, "--out", str(out), "--dry-run")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["texts"] == {"animals": 32, "weather": 32} and report["passes"] == 2
    assert report["tokens"] > 300 and report["seconds"] > 0 and not out.exists()
    assert command.main(["--run", run["run"], "--data", run["data"], "--dry-run"]) == 0
    assert "nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--concepts", "animals,plants"), "one of the concepts animals, weather, got 'plants'"),
        (("--concepts", "animals"), "two concepts, got only 'animals'"),
        (("--label", "mood"), "expected the column 'mood', got text, label, doc"),
        (("--data", "missing.jsonl"), "labelled texts at missing.jsonl, got nothing"),
        (("--units", "heads"), "out of latents, residual, neurons, got 'heads'"),
        (("--correction", "max"), "bh or by, got 'max'"),
        (("--permutations", "1"), "at least 2 --permutations"),
        (("--n_per_class", "500"), "between 1 and 32 texts of each concept"),
        (("--run", "nowhere"), "nowhere"),
    ],
)
def test_the_command_refuses(run, more, message: str, tmp_path, capsys) -> None:
    argv = [*arguments(run, "--out", str(tmp_path / "out")), *more]
    assert command.main(argv) == 2
    seen = capsys.readouterr()
    assert message in seen.err and len(seen.err.splitlines()) == 1 and seen.out == ""
    assert not (tmp_path / "out").exists()
