"""What ``sae-apps geo`` is to do: run, places, weights and labels opened, and what names them."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from sae_apps.geospatial.places import Places, load_places
from sae_apps.geospatial.prompts import ProbeConfig
from sae_apps.geospatial.weights import SpatialWeights, spatial_weights
from sae_core.errors import UserError

from .common import plain
from .featurize import FinishedRun, open_run
from .select_files import digest

if TYPE_CHECKING:
    from sae_apps.geospatial.report import Nulls
    from sae_apps.selection.encoder import Encoder

    from .geo import GeoOptions, MoranOptions, NeighbourOptions, PlaceOptions


@dataclass(frozen=True)
class Asked:
    """The options, by group."""

    chosen: "GeoOptions"
    place: "PlaceOptions"
    probe: ProbeConfig
    weights: "NeighbourOptions"
    test: "MoranOptions"
    method: str
    accept_terms: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be done; the model is opened only where something is yet to be encoded."""

    asked: Asked
    run: FinishedRun
    places: Places
    weights: SpatialWeights
    groups: list[Any] | None
    """Group of each place; neighbours are of one group."""
    labels: list[Any]
    """Label of each place, within which nulls permute; None where there is none."""
    covariates: dict[str, Float[np.ndarray, " n"]]
    """What the third null takes out beside the length of the name."""
    cache: Path
    """Folder of the features of these places in the run."""
    out: Path
    """Folder of the result."""
    identity: dict[str, Any]
    """All that the result depends on."""

    @cached_property
    def encoder(self) -> "Encoder":
        """The model and the SAE, checked to belong together."""
        from sae_apps.selection.embed import EmbedConfig
        from sae_apps.selection.encoder import load_encoder

        chosen = self.asked.chosen
        return load_encoder(
            self.run.folder.path,
            model=chosen.model,
            device=chosen.device or self.run.settings.model.device,
            accept_terms=self.asked.accept_terms,
            config=EmbedConfig(form="plain"),
        )


def absent(asked: Asked) -> list[str]:
    """What is not on this machine yet, so that an estimate would have to download it."""
    from .cached import absent_model

    return absent_model(asked.chosen.model or open_run(asked.chosen.run).settings.model.name)


def make_plan(asked: Asked) -> Plan:
    """Open run and places, and build the weights.

    Raises:
        UserError: anything that is missing or does not fit, before a name is read.
    """
    chosen = asked.chosen
    finished = open_run(chosen.run)
    if not chosen.places:
        raise UserError("Expected places, got none: add --places IT, world or a file.")
    check_tests(asked)
    places = load_places(chosen.places, **asdict(asked.place))
    groups = groups_of(places, asked.weights.groups, chosen.places)
    options = asdict(asked.weights) | {"groups": groups, "crs": _crs(asked.weights.crs)}
    weights = spatial_weights(places, seed=chosen.seed, **options)
    labels = labels_of(places, asked.test.strata)
    covariates = covariates_of(places, asked.test.covariates)
    encoding = {
        "places": places.source,
        "rows": digest([places.row_id.tolist(), places.name, places.lat.tolist(),
                        places.lon.tolist(), places.label]),
        "model": chosen.model or finished.settings.model.name,
        "sae_hash": finished.sae.hash(),
        "hook_point": finished.hook_point,
        "probe": asdict(replace(asked.probe, batch_tokens=1)),
    }  # fmt: skip
    identity = {
        "encoding": encoding,
        "weights": asdict(asked.weights),
        "test": asdict(asked.test),
        "top": chosen.top,
        "maps": chosen.maps,
        "baseline": chosen.baseline,
        "seed": chosen.seed,
    }
    name = short_name(chosen.places)
    cache = finished.folder.path / "places" / f"{name}-{digest(encoding)}"
    out = Path(chosen.out) if chosen.out else finished.folder.path / f"geo-{name}"
    return Plan(
        asked, finished, places, weights, groups, labels, covariates, cache, out, plain(identity)
    )


def check_tests(asked: Asked) -> None:
    """Raises:
    UserError: the tests would refuse their options, once all places have been read.
    """
    from sae_apps.geospatial.local import check_options as check_local
    from sae_apps.geospatial.moran import check_options

    nulls_of(asked)
    test = asked.test
    check_options(
        test.permutations, test.alternative, test.min_active, correction_of(test), test.adaptive,
        asked.chosen.seed,
    )  # fmt: skip
    check_local(local_permutations(test), test.local_alternative, rate_of(test), test.local_alpha)


def nulls_of(asked: Asked) -> "Nulls":
    """The nulls of the report."""
    from sae_apps.geospatial.report import Nulls

    test = asked.test
    return Nulls(
        min_i=test.min_i,
        alpha=test.alpha,
        permutations=test.permutations,
        permutations_screened=10 * test.permutations + 9,
        min_active=test.min_active,
        p_adjust=rate_of(test),
        seed=asked.chosen.seed,
        device=asked.chosen.device,
    )


def correction_of(test: "MoranOptions") -> Literal["bh", "by", "max"] | None:
    """Over features, as ``moran`` names it."""
    return None if test.p_adjust == "none" else test.p_adjust


def rate_of(test: "MoranOptions") -> Literal["bh", "by"] | None:
    """The same where max is not to be had."""
    correction = correction_of(test)
    return "bh" if correction == "max" else correction


def local_permutations(test: "MoranOptions") -> int:
    """Ten times as many where places are corrected for: a two-sided p is at least 2 / (B + 1)."""
    return test.permutations if test.p_adjust == "none" else 10 * test.permutations + 9


def short_name(spec: str) -> str:
    """The places as a part of a file name."""
    stem = Path(spec).name.partition(".")[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem).strip("-") or "places"


def groups_of(places: Places, wanted: str, spec: str) -> list[Any] | None:
    """The column that neighbours share; auto: countries, where several were asked for by name."""
    if wanted == "none":
        return None
    if wanted != "auto":
        return places.column(wanted)
    if "country" not in places.table.column_names or len(spec.split(",")) < 2:
        return None
    countries = places.column("country")
    return countries if len(set(countries)) > 1 and None not in countries else None


def labels_of(places: Places, wanted: str) -> list[Any]:
    """Labels for the nulls within labels; all None where there are none.

    Raises:
        UserError: no such column, or one that has the same label everywhere.
    """
    if wanted == "none":
        return [None] * places.n
    if wanted == "auto":
        return list(places.label)
    labels = places.column(wanted)
    if len(set(labels) - {None}) < 2:
        raise UserError(f"Expected at least two labels in {wanted!r}, got {labels[:1]}.")
    return labels


def covariate_names(text: str) -> list[str]:
    """``n_tokens,population`` as a list; none: empty."""
    names = [name.strip() for name in text.split(",")]
    if text == "none":
        return []
    if not all(names):
        raise UserError(f"Expected covariates as names joined by commas, or none, got {text!r}.")
    return names


def covariates_of(places: Places, text: str) -> dict[str, Float[np.ndarray, " n"]]:
    """Columns of the places, as numbers.

    Raises:
        UserError: no such column, or one that holds something else than numbers.
    """
    found = {}
    for name in covariate_names(text):
        values = places.column(name)
        wrong = next((v for v in values if isinstance(v, bool) or not isinstance(v, Real)), 0)
        if wrong != 0 or not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise UserError(f"Expected a number in {name!r} for every place, got {wrong!r}.")
        found[name] = np.asarray(values, dtype=np.float64)
    return found


def _crs(text: str | None) -> Any:
    return int(text) if text is not None and text.isdigit() else text
