"""The outcome of a report on geography: tables of all features, of shares, and of the leading."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from sae_core.store import atomic_folder

if TYPE_CHECKING:
    from sae_apps.geospatial.places import Places

NULLS = ("free", "within", "after", "beyond")
N_TOP_PLACES = 8
HALF = 0.5


@dataclass(frozen=True, eq=False)
class GeoReport:
    """Moran's I of features and baselines under four nulls; see ``report`` for what passes."""

    table: pa.Table
    """A row per set and feature: ``I``, ``I_after`` and ``I_beyond`` (of residuals); p, q, mean and
    sd of each null; ``passes_NULL_p``, ``passes_NULL_q``, ``passes_survives_q``; ``verdict``."""
    summary: pa.Table
    """A row per set: features, features tested, how many pass each null, largest I."""
    leading: pa.Table
    """The features of the largest I: top places, their activations, commonest label."""
    how: dict[str, Any]
    """Places, thresholds, correction, covariates, and how each null was made."""

    def passing(self, null: str = "survives", by: str = "q", name: str = "features") -> list[int]:
        """Features of a set that pass a null, or the first three (``survives``)."""
        mine = set_table(self.table, name)
        return mine.filter(mine[f"passes_{null}_{by}"].combine_chunks())["feature"].to_pylist()

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write ``moran.parquet``, ``leading.parquet`` and ``summary.json``, all or none.

        Raises:
            UserError: the folder is taken, or the disk is full.
        """
        with atomic_folder(folder, overwrite=overwrite) as temp:
            for name, table in (("moran", self.table), ("leading", self.leading)):
                metadata = {b"how": json.dumps(self.how, default=str).encode()}
                pq.write_table(table.replace_schema_metadata(metadata), temp / f"{name}.parquet")
            text = json.dumps({"sets": self.summary.to_pylist(), "how": self.how}, indent=1,
                              default=str, ensure_ascii=False)  # fmt: skip
            (temp / "summary.json").write_text(text + "\n", encoding="utf-8")


def verdict(table: pa.Table, alpha: float) -> list[str]:
    """A word for each feature, by q: what is left of it under the nulls.

    A feature whose q under free permutation is below alpha, but whose I is too small, is ``weak``.
    """
    status, q = table["status"].to_pylist(), table["q_free"].to_pylist()
    flags = {
        name: table[f"passes_{name}_q"].to_pylist()
        for name in NULLS
        if f"passes_{name}_q" in table.column_names
    }
    words = []
    for i, state in enumerate(status):
        if state != "ok":
            words.append(f"not tested: {state}")
        elif not flags["free"][i]:
            words.append("weak" if q[i] < alpha else "not spatial")
        elif not flags.get("within", flags["free"])[i]:
            words.append("labels alone")
        else:
            beyond = "beyond" in flags and flags["beyond"][i]
            stays = "beyond labels" if beyond else "survives"
            words.append(stays if flags["after"][i] else "not after covariates")
    return words


def summary_table(table: pa.Table) -> pa.Table:
    """How many features of each set pass, in numbers and as shares of those tested.

    ``n_half`` counts the tested features with I >= 0.5, whatever their p.
    """
    rows = []
    for name in dict.fromkeys(table["set"].to_pylist()):
        mine = set_table(table, name)
        tested = np.array(mine["status"].to_pylist()) == "ok"
        row: dict[str, Any] = {
            "set": name, "n_features": len(mine), "n_tested": int(tested.sum()),
        }  # fmt: skip
        for null in (*NULLS, "survives"):
            for by in ("p", "q"):
                column = f"passes_{null}_{by}"
                is_there = column in mine.column_names
                row[f"n_{null}_{by}"] = sum(mine[column].to_pylist()) if is_there else None
            count = row[f"n_{null}_q"]
            row[f"{null}_frac"] = count / tested.sum() if tested.any() and is_there else None
        for one in ("I", "I_after", "I_beyond"):
            known = mine[one].to_numpy()[tested] if one in mine.column_names else np.empty(0)
            known = known[~np.isnan(known)]
            row[f"max_{one}"] = float(known.max()) if len(known) else None
        row["n_half"] = int((np.nan_to_num(mine["I"].to_numpy()[tested]) >= HALF).sum())
        rows.append(row)
    return pa.Table.from_pylist(rows)


def set_table(table: pa.Table, name: str) -> pa.Table:
    """The rows of one set."""
    return table.filter(pa.array(np.array(table["set"].to_pylist()) == name))


def leading_table(
    table: pa.Table, matrix: Any, places: "Places", labels: list[Any] | None, n: int
) -> pa.Table:
    """The n features of the largest I with the places that excite them.

    ``label_share`` is the part of the feature's summed activation that lies in ``label``, the label
    with the largest such part; ``label_base`` the part of all places that bear it. Places without
    a label count in the sums, but are no label.
    """
    is_tested = table["status"].to_numpy(zero_copy_only=False) == "ok"
    index = np.where(is_tested, np.nan_to_num(table["I"].to_numpy(), nan=-np.inf), -np.inf)
    order = [int(i) for i in np.argsort(-index, kind="stable")[:n] if np.isfinite(index[i])]
    rows = []
    for i in order:
        values = matrix[:, [i]]
        values = values.toarray()[:, 0] if sparse.issparse(values) else values[:, 0]
        top = np.argsort(-values, kind="stable")[:N_TOP_PLACES]
        top = top[values[top] > 0] if sparse.issparse(matrix) else top
        record = table.slice(i, 1).to_pylist()[0]
        rows.append(
            {
                **{k: record[k] for k in ("feature", "n_active", "I", "I_after", "verdict")},
                "I_beyond": record.get("I_beyond"),
                "top_places": [places.name[j] for j in top],
                "top_row_ids": [int(places.row_id[j]) for j in top],
                "top_values": [float(values[j]) for j in top],
                **_label_of(np.maximum(values, 0).astype(np.float64), labels),
            }
        )
    return pa.Table.from_pylist(rows, schema=None if rows else _EMPTY)


_EMPTY = pa.schema([("feature", pa.int64()), ("I", pa.float64()), ("verdict", pa.string())])


def _label_of(values: np.ndarray, labels: list[Any] | None) -> dict[str, Any]:
    has_label = np.array([one is not None for one in labels or ()], dtype=bool)
    if labels is None or not values[has_label].sum() > 0:
        return {"label": None, "label_share": None, "label_base": None}
    names = np.array([str(one) for one in labels if one is not None])
    known, code = np.unique(names, return_inverse=True)
    mass = np.bincount(code, weights=values[has_label]) / values.sum()
    best = int(mass.argmax())
    return {
        "label": str(known[best]),
        "label_share": float(mass[best]),
        "label_base": float((code == best).sum() / len(values)),
    }
