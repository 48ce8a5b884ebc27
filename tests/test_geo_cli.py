"""``sae-apps geo`` through ``main([...])`` and as installed: files, reuse, presets, refusals."""

import errno
import gzip
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("geopandas")
pytest.importorskip("matplotlib")

from sae_apps.geospatial.moran import moran
from sae_apps.geospatial.moran_table import load_moran
from sae_apps.geospatial.places import Places, load_places
from sae_apps.geospatial.prompts import PRESETS
from sae_apps.geospatial.weights import spatial_weights
from sae_apps.tasks import geo, geo_plan, geo_run
from sae_apps.tasks.common import Interrupted
from sae_apps.tasks.main import main
from sae_core.store import load_features, verify_folder
from tests.command import installed, refusal, run_json, train_small

N = 120
# names that a model of stories can tell apart, in the west and in the east
WORDS = (("Lily", "Tom", "Sam", "Ben"), ("cat", "dog", "bird", "fish"))
QUICK = ("--top", "2", "--permutations", "199", "--maps", "none", "--quiet")


def write_places(path: Path) -> str:
    """Two regions a thousand kilometres apart; each has its own words."""
    rng = np.random.default_rng(0)
    lines = ["name,lat,lon,admin,height,mood"]
    for i in range(N):
        side = i % 2
        words = WORDS[side]
        name = f"{words[i // 2 % 4]} {words[i // 8 % 4]}"
        lat, lon = rng.uniform(40, 50), rng.uniform(0, 5) + 15 * side
        lines.append(f"{name},{lat:.4f},{lon:.4f},{('West', 'East')[side]},{i},glad")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def data(
    shared_data: Path, stories260k: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A run, and a file of places."""
    folder = tmp_path_factory.mktemp("geo")
    with gzip.open(shared_data / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["question"] for _ in range(40)]
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = train_small(stories260k, file, folder / "run")
    return {"run": run, "places": write_places(folder / "places.csv")}


@pytest.fixture(scope="module")
def made(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole result with maps; tests leave it as it is."""
    out = tmp_path_factory.mktemp("made") / "result"
    argv = arguments(data, out)
    argv[argv.index("none")] = "svg"
    assert main(argv) == 0
    return out


def arguments(data: dict[str, str], out: object, *more: str) -> list[str]:
    argv = ["geo", "--run", data["run"], "--places", data["places"], "--out", str(out)]
    return [*argv, *QUICK, *more]


def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no name may be read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a name was read")

    monkeypatch.setattr(geo_run, "probe", refuse)
    monkeypatch.setattr(geo_run, "probe_units", refuse)


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())["summary"]


# ---- what it writes ----


def test_the_folder_is_whole(made: Path) -> None:
    files = set(verify_folder(made)["files"])
    tables = {f"{name}.parquet" for name in ("moran", "nulls", "lisa", "places")}
    leading = [one["feature"] for one in summary_of(made)["leading"]]
    maps = {
        f"maps/{k + 1:02d}-latent-{latent}-{kind}.svg"
        for k, latent in enumerate(leading)
        for kind in ("value", "clusters", "scatter")
    }
    assert len(leading) == 2
    assert files == tables | maps | {"summary.json", "report.html"}


def test_the_command_is_the_functions(data: dict[str, str], made: Path) -> None:
    places = load_places(data["places"])
    features = load_features(summary_of(made)["features"])
    assert features.row_ids.tolist() == places.row_id.tolist()
    expected = moran(features, spatial_weights(places), permutations=199)
    found = load_moran(made / "moran.parquet")
    assert found.table.equals(expected.table) and found.how["permutations"] == 199
    assert [one["feature"] for one in summary_of(made)["leading"]] == expected.top(2).tolist()


def test_planted_regions_are_found_and_vanish_within_labels(made: Path) -> None:
    """Words follow the region, so the free null falls and the one within regions does not."""
    latents, raw = summary_of(made)["passing"]
    assert (latents["what"], raw["what"]) == ("SAE latents", "raw units")
    assert latents["free"] > 0 and raw["free"] > 0
    assert latents["within"] == raw["within"] == 0 and latents["survives"] == 0
    assert raw["n_tested"] == 64 and latents["n_features"] == 128
    for one in summary_of(made)["leading"]:
        assert one["I"] > 0.3 and one["verdict"] == "labels alone"


def test_places_and_clusters_can_be_opened_by_others(data: dict[str, str], made: Path) -> None:
    import geopandas

    frame = geopandas.read_parquet(made / "places.parquet")
    assert frame.crs is not None and frame.crs.to_authority() == ("EPSG", "4326")
    assert len(frame) == N
    assert set(frame["admin"]) == {"West", "East"}
    lisa = pq.read_table(made / "lisa.parquet").to_pandas()
    assert len(lisa) == 2 * N
    features = load_features(summary_of(made)["features"])
    for one in summary_of(made)["leading"]:
        latent = one["feature"]
        values = features.acts[:, [latent]].toarray()[:, 0]
        assert np.array_equal(frame[f"latent_{latent}"].to_numpy(), values)
        mine = lisa[lisa["feature"] == latent]
        assert mine["label"].tolist() == frame[f"cluster_{latent}"].tolist()
        counts = mine["label"].value_counts().to_dict()
        assert counts == {k: v for k, v in one["clusters"].items() if v}
        # the mean of z lag is Moran's I (row-standardised), on both sides of the table
        assert (mine["z"] * mine["lag"]).mean() == pytest.approx(one["I"], rel=1e-9)
        best = frame.sort_values(f"latent_{latent}", ascending=False, kind="stable")["name"]
        assert one["top_places"][:3] == best.tolist()[:3]


def test_the_page_has_the_map_and_the_run(made: Path) -> None:
    page = (made / "report.html").read_text()
    for words in ("Which latents know where places are", 'id="geography-data"', 'id="overview"'):
        assert words in page
    start = page.index(">", page.index('id="geography-data"')) + 1
    shown = json.loads(page[start : page.index("</script>", start)])
    assert len(shown["names"]) == N and shown["labels"] == ["East", "West"]
    leading = summary_of(made)["leading"]
    assert [one["title"] for one in shown["features"]] == [
        f"latent {x['feature']}" for x in leading
    ]
    assert [one["I"] for one in shown["features"]] == [round(x["I"], 6) for x in leading]
    clusters = [len(one["lisa"]) - one["lisa"].count("0") for one in shown["features"]]
    assert clusters == [N - x["clusters"]["Insignificant"] for x in leading]
    assert sum(map(sum, (shown["lines"]["n"], shown["land"]["n"]))) > 100  # Natural Earth
    assert "Natural Earth" in page and "ordinary tokens" in page
    assert "GeoNames, CC BY" not in page  # the places are the user's own


def test_summary_for_people_and_as_json(
    data: dict[str, str], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, made)
    argv[argv.index("none")] = "svg"
    capsys.readouterr()
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for words in ("120 places, 2 labels", "8 nearest", "pass: I ≥ 0.3 and q < 0.01", "raw units"):
        assert words in shown
    found = run_json(capsys, *argv)
    assert found == summary_of(made)
    assert f"latent {found['leading'][0]['feature']:>6}" in shown
    assert found["weights"]["n_links"] == 8 * N and found["method"] == "careful"


def test_other_tests_need_no_model(
    data: dict[str, str],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_model(monkeypatch)
    more = ("--k", "4", "--strata", "none", "--covariates", "height", "--adaptive", "--seed", "3")
    found = run_json(capsys, *arguments(data, tmp_path / "a", *more, "--p-adjust", "by"))
    assert found["features"] == summary_of(made)["features"]
    assert found["weights"]["n_links"] == 4 * N and found["places"]["n_labels"] == 0
    assert found["passing"][0]["within"] is None
    assert "height" in found["how"]["nulls"]["covariates"]
    assert found["how"]["moran"]["adaptive"] and found["how"]["moran"]["seed"] == 3
    assert found["how"]["nulls"]["p_adjust"] == "by"
    assert not (tmp_path / "a" / "maps").exists()
    with pytest.raises(AssertionError, match="was read"):  # control: another prompt needs one
        main(arguments(data, tmp_path / "b", "--template", "We went to {name}"))
    assert not (tmp_path / "b").exists()


def test_published_method_sets_the_rest(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = geo.parse(["--method", "published"])
    assert options.probe.as_dict() == geo.asdict(PRESETS["published"])
    assert options.weights.metric == "planar" and options.weights.k == 8
    assert (options.test.p_adjust, options.test.alpha, options.test.min_i) == ("none", 0.01, 0.3)
    assert options.test.permutations == 999 and options.test.local_pooled
    more = ("--method", "published", "--metric", "great_circle", "--baseline", "none")
    found = run_json(capsys, *arguments(data, tmp_path / "a", *more))
    assert found["rule"] == "I ≥ 0.3 and p < 0.01" and "BOS pooled" in found["prompt"]
    assert len(found["passing"]) == 1 and found["passing"][0]["free"] > 0
    pooled = json.loads((tmp_path / "a" / "summary.json").read_text())["identity"]
    assert pooled["test"]["local_alternative"] == "directed"
    message = refusal(capsys, *arguments(data, tmp_path / "b", "--method", "published"))
    assert "metric='great_circle'" in message  # the published projection of these is not known


# ---- files that are there ----


def test_the_same_command_twice_and_other_results(
    data: dict[str, str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(data, made)  # without maps
    message = refusal(capsys, *argv)
    assert "maps is 'svg' there and 'none' here" in message and "--overwrite" in message
    out = tmp_path / "result"
    assert main(arguments(data, out)) == 0
    before = (out / "report.html").stat().st_mtime_ns
    assert main(arguments(data, out)) == 0
    assert (out / "report.html").stat().st_mtime_ns == before
    (out / "report.html").write_text("changed")
    assert "report.html" in refusal(capsys, *arguments(data, out))
    assert main(arguments(data, out, "--overwrite")) == 0
    assert (out / "report.html").stat().st_size > 10_000
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert "mine" in refusal(capsys, *arguments(data, tmp_path / "mine", *more))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["note.txt"]


@pytest.mark.parametrize("what", ["full disk", "signal"])
def test_nothing_is_left_half_written(
    what: str,
    data: dict[str, str],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        if what == "signal":
            raise Interrupted(signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sae_apps.tasks.geo_files._write_summary", stop)
        argv = arguments(data, tmp_path / "out")
        if what == "signal":
            assert main(argv) == 143
        else:
            assert "full" in refusal(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


# ---- estimates and refusals ----


def test_dry_run_writes_nothing(
    data: dict[str, str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = set((Path(data["run"]) / "places").iterdir())
    found = run_json(capsys, *arguments(data, tmp_path / "a", "--dry-run"))
    assert found["passes"] == 0 and found["n_places"] == N  # both are kept from before
    found = run_json(capsys, *arguments(data, tmp_path / "a", "--dry-run", "--pooling", "mean"))
    assert found["passes"] == 2 and found["seconds"] > 0 and found["tokens"] > 4 * N
    assert main(arguments(data, tmp_path / "a", "--dry-run")) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert set((Path(data["run"]) / "places").iterdir()) == kept


BAD_INPUT = {
    "no run": (["--run", "./nowhere"], ["nowhere"]),
    "no places": (["--places", ""], ["--places IT"]),
    "no country": (["--places", "IX"], ["IX"]),
    "no file": (["--places", "./nowhere.csv"], ["nowhere.csv"]),
    "no column": (["--lat", "latitude"], ["latitude"]),
    "no label": (["--strata", "region"], ["region"]),
    "one label": (["--strata", "mood"], ["two labels", "mood"]),
    "no number": (["--covariates", "mood"], ["number", "'mood'", "'glad'"]),
    "no covariate": (["--covariates", "height,,"], ["joined by commas", "height,,"]),
    "no field": (["--template", "{town}"], ["town"]),
    "few places": (["--k", "200"], ["200", "120"]),
    "unknown method": (["--method", "publshed"], ["published"]),
    "unknown option": (["--permutation", "9"], ["--permutations"]),
    "few permutations": (["--permutations", "9"], ["9", "0.01"]),
    "no top": (["--top", "0"], ["at least 1", "0"]),
    "unknown adjustment": (["--p-adjust", "holm"], ["holm", "bh"]),
    "unknown metric": (["--metric", "taxi"], ["taxi", "planar"]),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_refuses(
    what: str,
    data: dict[str, str],
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, words = BAD_INPUT[what]
    message = refusal(capsys, *arguments(data, tmp_path / "x"), *flags)
    for word in words:
        assert word in message, message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--permutations", "9"],
        ["--alpha", "2"],
        ["--min-active", "0"],
        ["--adaptive", "--p-adjust", "max"],
        ["--seed", "-1"],
        ["--local-alpha", "0"],
    ],
)
def test_tests_that_cannot_be_are_refused_before_a_name_is_read(
    flags: list[str],
    data: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_model(monkeypatch)
    unread = ["--template", "Near {name}"]  # nothing of it lies in the run
    message = refusal(capsys, *arguments(data, tmp_path / "x"), *unread, *flags)
    assert flags[-1] in message or "adaptive" in message
    assert message == refusal(capsys, *arguments(data, tmp_path / "x"), "--dry-run", *flags)


def test_bad_coordinates_name_the_row(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path(data["places"]).read_text().replace("name,lat,lon", "name,lon,lat")
    (tmp_path / "swapped.csv").write_text(text.replace("\nLily", "\nBad,0,91,West,1,sad\nLily", 1))
    argv = arguments(data | {"places": str(tmp_path / "swapped.csv")}, tmp_path / "x")
    message = refusal(capsys, *argv)
    assert "91" in message and "Bad" in message


def test_groups_follow_the_countries_that_were_asked_for() -> None:
    table = {"row_id": [1, 2, 3], "name": ["a", "b", "c"], "lat": [1.0, 2, 3], "lon": [1.0, 2, 3]}
    table |= {"country": ["IT", "IT", "GB"], "admin": ["Lazio", None, "Wales"]}
    both = Places(pa.table(table), "three places")
    assert geo_plan.groups_of(both, "auto", "IT,GB") == ["IT", "IT", "GB"]
    assert geo_plan.groups_of(both, "none", "IT,GB") is None
    assert geo_plan.groups_of(both, "auto", "world") is None
    assert geo_plan.groups_of(both.take([0, 1]), "auto", "IT,GB") is None
    assert geo_plan.groups_of(both, "admin", "world") == ["Lazio", None, "Wales"]
    assert geo_plan.labels_of(both, "auto") == both.label
    assert geo_plan.labels_of(both, "country") == ["IT", "IT", "GB"]
    assert geo_plan.labels_of(both, "none") == [None] * 3
    assert geo_plan.short_name("US:NY+NJ+CT+PA") == "US-NY-NJ-CT-PA"
    assert geo_plan.short_name("/a b/my places.csv.gz") == "my-places"


def test_installed_command(data: dict[str, str], made: Path) -> None:
    argv = arguments(data, made)
    argv[argv.index("none")] = "svg"
    done = subprocess.run([installed(), *argv], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "120 places" in done.stdout
