"""What ``sae-apps geo`` writes: one folder, whole or absent.

moran.parquet    every latent under free permutation: I, moments, p, q, status
nulls.parquet    latents and raw units under the four nulls: I, p, q, what passes, a verdict
lisa.parquet     local Moran's I of the leading latents: a row for each latent and place
places.parquet   GeoParquet: the places, with value and cluster of each leading latent
maps/            value map, cluster map and scatter plot of each leading latent
report.html      the page
summary.json     settings, identity of everything read, the numbers
manifest.json    sha256 of every file, written last
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sae_apps.geospatial.places import Places
from sae_core.errors import UserError
from sae_core.store import atomic_folder

from .common import to_json
from .finished import SUMMARY, finished_folder

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures

    from .geo_plan import Plan
    from .geo_run import Result

FORMAT, VERSION = "sae-apps-geo", 1


def finished(out: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the same command wrote to ``out`` before, whole; None where nothing is there.

    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    return finished_folder(out, identity, FORMAT, VERSION)


def write_result(
    plan: "Plan", features: "SparseFeatures", result: "Result", summary: Mapping[str, Any]
) -> None:
    """Write everything beside its place, then rename.

    Raises:
        UserError: the folder is taken, the disk is full, or it may not be written.
    """
    import pyarrow.parquet as pq

    from .geo_page import write_page

    with atomic_folder(plan.out, overwrite=plan.asked.chosen.overwrite) as folder:
        result.table.save(folder / "moran.parquet")
        pq.write_table(result.report.table, folder / "nulls.parquet")
        if result.local is not None:
            pq.write_table(lisa_table(result), folder / "lisa.parquet")
        frame = places_table(plan.places, features, result)
        Places(frame, plan.places.source).save(folder / "places.parquet")
        write_maps(folder / "maps", plan, result)
        write_page(folder / "report.html", plan, summary)
        _write_summary(folder / SUMMARY, plan.identity, summary)


def lisa_table(result: "Result") -> pa.Table:
    """A row for each leading latent and place."""
    local = result.local
    assert local is not None
    tables = []
    for j, latent in enumerate(result.leading):
        one = local.feature(j)
        n = len(one.row_id)
        tables.append(
            pa.table(
                {
                    "feature": np.full(n, latent, dtype=np.int64),
                    "row_id": one.row_id,
                    "value": one.values,
                    "z": one.z,
                    "lag": one.lag,
                    "Is": one.Is,
                    "q": one.q,
                    "p_sim": one.p_sim,
                    "p_adjusted": one.p_adjusted,
                    "label": pa.array(one.label.tolist(), pa.string()),
                }
            )
        )
    return pa.concat_tables(tables)


def places_table(places: Places, features: "SparseFeatures", result: "Result") -> pa.Table:
    """The places with ``latent_N`` and ``cluster_N`` of each leading latent."""
    table = places.table
    for name in [*table.column_names]:
        if name.startswith(("latent_", "cluster_")):
            raise UserError(f"Expected places without a column {name!r}, which is written here.")
    for j, latent in enumerate(result.leading):
        assert result.local is not None
        one = result.local.feature(j)
        table = table.append_column(f"latent_{latent}", pa.array(one.values, pa.float64()))
        labels = pa.array(one.label.tolist(), pa.string())
        table = table.append_column(f"cluster_{latent}", labels)
    return table


def write_maps(folder: Path, plan: "Plan", result: "Result") -> None:
    """A value map, a cluster map and a scatter plot of each leading latent."""
    from sae_apps.geospatial import maps

    suffix = plan.asked.chosen.maps
    if suffix == "none" or result.local is None:
        return
    folder.mkdir()
    for j, latent in enumerate(result.leading):
        one = result.local.feature(j)
        title = f"latent {latent}"
        figures = {
            "value": maps.value_map(one.values, plan.places, title=title),
            "clusters": maps.lisa_map(one, plan.places),
            "scatter": maps.moran_scatter(one),
        }
        for name, figure in figures.items():
            maps.save_figure(figure, folder / f"{j + 1:02d}-latent-{latent}-{name}.{suffix}")


def _write_summary(file: Path, identity: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "summary": summary,
    }
    file.write_text(to_json(content) + "\n", encoding="utf-8")
