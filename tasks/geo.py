"""``sae-apps geo``: which features know where places are, tested under four nulls and mapped."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from sae_core.errors import UserError

from .common import PROG, StopSignal, run_command
from .parsing import CommandParser, take

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from sae_apps.geospatial.prompts import ProbeConfig

LOG = logging.getLogger(__name__)
EXAMPLE = f"{PROG} geo --run runs/x --places IT --out runs/x/geo-IT"
METHODS = ("careful", "question", "published")


@dataclass(frozen=True)
class GeoOptions:
    """What is looked at, and where it goes."""

    run: str | None = None
    """Folder of a finished run: the SAE and its model."""
    places: str | None = None
    """A country (IT), some of its divisions (US:NY+NJ+CT+PA), several (GB,IT), world for large
    cities, or a file with name, lat and lon: csv, tsv, parquet, GeoParquet or GeoJSON."""
    out: str | None = None
    """Folder of the result (null: geo-PLACES in the run)."""
    top: int = 10
    """Leading features that are mapped."""
    maps: Literal["png", "svg", "none"] = "png"
    """Format of the static maps."""
    baseline: Literal["raw", "none"] = "raw"
    """raw: also test the activations themselves, unit by unit; one more pass of the model."""
    model: str | None = None
    """Where the run's model is now, if it has moved."""
    device: str | None = None
    """Where model, SAE and tests run (null: as in training)."""
    seed: int = 0
    """Of all permutations."""
    overwrite: bool = False
    """Replace what this command wrote there before."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"Expected --top of at least 1 feature, got {self.top}.")


@dataclass(frozen=True)
class PlaceOptions:
    """Which places, and the columns of a file."""

    min_population: int | None = None
    """Least number of inhabitants (null: 150,000 for world, 500 for IT, 1 for others)."""
    limit: int | None = None
    """At most so many places, the most populous."""
    name: str = "name"
    """Column of a file with the names."""
    lat: str = "lat"
    """Column with the latitudes [degrees]."""
    lon: str = "lon"
    """Column with the longitudes [degrees]."""
    admin: str | None = None
    """Column with a label such as the region (null: admin)."""
    country: str | None = None
    """Column with the country (null: country)."""


@dataclass(frozen=True)
class NeighbourOptions:
    """Who is whose neighbour."""

    method: Literal["knn", "band"] = "knn"
    """knn: the k nearest; band: all within band_km."""
    k: int = 8
    """Neighbours of each place, for knn."""
    band_km: float | None = None
    """Distance for band [km]."""
    metric: Literal["great_circle", "planar"] = "great_circle"
    """planar: in projected coordinates, as published."""
    crs: str | None = None
    """Projection of planar, an EPSG code (null: that of the published study)."""
    groups: str = "auto"
    """Neighbours share this column; auto: the country where several were asked for by name; none:
    neighbours across all borders."""
    coincident: Literal["keep", "jitter", "merge", "raise"] = "keep"
    """What becomes of places that share their coordinates."""
    islands: Literal["keep", "nearest", "raise"] = "keep"
    """What becomes of places without a neighbour within band_km."""


@dataclass(frozen=True)
class MoranOptions:
    """How features are tested."""

    permutations: int = 999
    """Of a feature, ten times as many under all nulls but the free one; the most where adaptive."""
    adaptive: bool = False
    """In moran.parquet: stop early for features that are clearly not spatial."""
    alternative: Literal["greater", "two-sided", "less"] = "greater"
    """Of moran.parquet; greater: neighbours are more alike than chance, as all the nulls are."""
    min_active: int = 10
    """Features that are active at fewer places are listed and not tested."""
    p_adjust: Literal["bh", "by", "max", "none"] = "bh"
    """Over features; max: family-wise in moran.parquet, bh elsewhere."""
    strata: str = "auto"
    """Column within which two of the nulls permute; auto: the label where there is one; none."""
    covariates: str = "none"
    """Columns, joined by commas, that two of the nulls take out beside the number of tokens and
    characters of the name."""
    min_i: float = 0.3
    """A feature passes with at least this I and an adjusted p below alpha."""
    alpha: float = 0.01
    """See min_i."""
    local_alternative: Literal["two-sided", "greater", "less", "folded", "directed"] = "two-sided"
    """Of the local clusters; directed: as published."""
    local_alpha: float = 0.05
    """Level of the local clusters, over the places of a feature."""
    local_pooled: bool = False
    """High and low against the mean of all places, as published, not of those of the group."""


PUBLISHED_NEIGHBOURS = NeighbourOptions(metric="planar")
PUBLISHED_TEST = MoranOptions(
    min_active=1,
    p_adjust="none",
    local_alternative="directed",
    local_alpha=0.01,
    local_pooled=True,
)


def preset(method: str) -> "tuple[ProbeConfig, NeighbourOptions, MoranOptions]":
    """The settings of a method."""
    from sae_apps.geospatial.prompts import PRESETS

    if method == "published":
        return PRESETS[method], PUBLISHED_NEIGHBOURS, PUBLISHED_TEST
    return PRESETS[method], NeighbourOptions(), MoranOptions()


def build_parser(method: str) -> CommandParser:
    """The parser with the defaults of a method."""
    from sae_apps.geospatial.prompts import ProbeConfig

    groups = {"probe": ProbeConfig, "weights": NeighbourOptions, "test": MoranOptions}
    short = {f.name: f"{key}.{f.name}" for key, cls in groups.items() for f in fields(cls)}
    short["neighbours"] = short.pop("method")  # --method is the preset
    parser = CommandParser(
        "geo",
        "Read the names of places with a language model, and find the features of its sparse "
        "autoencoder whose values follow the map: Moran's I of every feature under a free "
        "permutation, one within labels, one after covariates and one after both; local clusters; "
        "maps; a report. "
        "What was encoded before is not encoded again.",
        EXAMPLE,
        short=short,
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default=method,
        help="careful: the last token of the name. question: the end of 'The city of NAME is "
        "located in', where the model is about to answer. published: as in arXiv 2505.03368, label "
        "in the prompt, mean over all tokens, no correction. It sets the defaults of --probe.*, "
        "--weights.* and --test.*",
    )
    parser.add_argument(
        "--accept_terms", action="store_true", help="Consent to the terms of a model that has some."
    )
    parser.add_options(GeoOptions)
    parser.add_options(PlaceOptions)
    for key, cls in groups.items():
        parser.add_options(cls, key)
    parser.set_defaults(
        {
            f"{key}.{name}": value
            for key, settings in zip(groups, preset(method), strict=True)
            for name, value in asdict(settings).items()
        }
    )
    return parser


def parse(argv: Sequence[str]) -> "Namespace":
    """The options. A method, also one in a configuration file, changes the defaults of others."""
    named = [arg.removeprefix("--method=") for arg in argv if arg.startswith("--method=")]
    named += [after for arg, after in zip(argv, argv[1:], strict=False) if arg == "--method"]
    method = named[-1] if named and named[-1] in METHODS else METHODS[0]
    options = build_parser(method).parse(argv)
    return options if options.method == method else build_parser(options.method).parse(argv)


def main(argv: Sequence[str]) -> int:
    from sae_apps.geospatial.prompts import ProbeConfig

    options = parse(argv)

    def work(_stop: StopSignal) -> tuple[Any, str]:
        from .geo_files import finished
        from .geo_plan import Asked, absent, make_plan
        from .geo_run import run
        from .geo_text import as_text, estimate, estimate_text

        asked = Asked(
            take(GeoOptions, options),
            take(PlaceOptions, options),
            take(ProbeConfig, options.probe),
            take(NeighbourOptions, options.weights),
            take(MoranOptions, options.test),
            options.method,
            options.accept_terms,
        )
        if options.dry_run and (missing := absent(asked)):
            report = {"missing": missing}
            return report, estimate_text(report)
        plan = make_plan(asked)
        if options.dry_run:
            report = estimate(asked, plan)
            return report, estimate_text(report)
        if not asked.chosen.overwrite and (found := finished(plan.out, plan.identity)):
            LOG.info("%s holds this result already: nothing to do.", plan.out)
            return found, as_text(found)
        summary = run(asked, plan, quiet=options.quiet)
        return summary, as_text(summary)

    return run_command(work, as_json=options.json, verbose=options.verbose, quiet=options.quiet)
