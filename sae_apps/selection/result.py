"""What a selection gives: picks, scores of all rows, reasons, counts, and where it came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_apps.selection.instructions import InstructionSource
from sae_core.disk import disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

OWN_COLUMNS = ("rank", "score")
"""Columns that the picks get; a record's own column of that name gets a ``_`` behind."""
SUFFIXES = (".jsonl", ".parquet")


@dataclass(frozen=True, eq=False)
class SelectionResult:
    """Rows picked from a pool for their likeness to targets."""

    picks: pa.Table
    """rank (from 0), row_id, score (against the prototype of ``group``), group, n_tokens (of the
    whole row), in the order of picking."""
    scores: pa.Table
    """row_id, score (the best over the groups), group (whose it is) and n_tokens of all rows, in
    the order of the pool; rows removed as duplicates or contaminated are among them."""
    reasons: pa.Table
    """row_id, latents and shares of each pick: the latents that make up most of the score, and the
    part of it that each makes up; empty lists for a metric that does not decompose."""
    counts: Mapping[str, int]
    """rows, without_text, empty (no active latent: score 0), exact_duplicates, near_duplicates,
    contaminated (each counts what the one before left), picked, picked_tokens."""
    config: Mapping[str, Any]
    """Budget and every setting."""
    provenance: Mapping[str, Any]
    """Model, hook point, SAE, pool, targets, evaluation set, versions."""
    source: InstructionSource | None = None
    """The pool's records; None where only features were given."""

    def __post_init__(self) -> None:
        for name, table in (("picks", self.picks), ("scores", self.scores)):
            if not np.isfinite(table["score"].to_numpy()).all():
                raise UserError(f"Expected finite scores of the {name}, got NaN or infinity.")

    def __len__(self) -> int:
        return self.picks.num_rows

    def why(self, row_id: int) -> list[tuple[int, float]]:
        """(latent, share of the score) of a pick, the largest share first.

        Raises:
            UserError: the row was not picked.
        """
        import pyarrow.compute as pc

        place = pc.index(self.reasons["row_id"], row_id).as_py()
        if place < 0:
            raise UserError(f"Expected the row_id of one of {len(self)} picks, got {row_id}.")
        latents, shares = (self.reasons[name][place].as_py() for name in ("latents", "shares"))
        return list(zip(latents, shares, strict=True))

    def records(self) -> list[dict[str, Any]]:
        """The original records of the picks with rank and score, in the order of the ranks.

        Raises:
            UserError: the pool was given as features, without its records.
        """
        if self.source is None:
            raise UserError(
                "Expected a selection from a pool with records, got one from features alone: "
                "pass the pool's records to select(..., records=...)."
            )
        own = {row["row_id"]: row for row in self.picks.to_pylist()}
        found = {row.row_id: row.record for row in self.source if row.row_id in own}
        if missing := own.keys() - found.keys():
            raise UserError(
                f"Expected all {len(own)} picks among the rows of {self.source.id}, got "
                f"{len(found)}: row_id {min(missing)} is not there."
            )
        return [
            {f"{key}_" if key in OWN_COLUMNS else key: value for key, value in record.items()}
            | {name: pick[name] for name in OWN_COLUMNS}
            for pick in own.values()
            for record in [found[pick["row_id"]]]
        ]

    def dataset(self) -> "Dataset":
        """The picks as a ``datasets.Dataset``: the original columns, rank and score.

        Raises:
            UserError: the pool was given as features, without its records.
        """
        from datasets import Dataset

        return Dataset(_table(self.records()))

    def write(self, path: str | Path) -> Path:
        """Write the picks as .jsonl or .parquet, and beside them ``NAME.selection.json``.

        The records are the original ones with rank and score; from features alone, the table of
        the picks. Each file is whole or absent.

        Returns:
            The path of the sidecar, which holds config, provenance and counts.
        Raises:
            UserError: another suffix, a full disk, a folder that may not be written.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise UserError(f"Expected a file that ends in {' or '.join(SUFFIXES)}, got {path}.")
        rows = self.picks.to_pylist() if self.source is None else self.records()
        temp = path.with_name(f".{path.name}.{owner_tag('tmp')}")
        sidecar = path.with_name(f"{path.name}.selection.json")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(path)
            with replaced_file(path, temp) as file:
                if path.suffix == ".parquet":
                    pq.write_table(_table(rows), file)
                else:
                    for row in rows:
                        line = json.dumps(_no_nan(row), ensure_ascii=False, default=str)
                        file.write(f"{line}\n".encode())
            facts = {
                "config": dict(self.config),
                "provenance": dict(self.provenance),
                "counts": dict(self.counts),
            }
            with replaced_file(sidecar, temp) as file:
                file.write(json.dumps(facts, indent=1, ensure_ascii=False).encode() + b"\n")
        return sidecar


def _table(records: list[dict[str, Any]]) -> pa.Table:
    """A table with the columns of all records, in the order of their first appearance."""
    names = dict.fromkeys(name for record in records for name in record)
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([record.get(name) for record in records], from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(
                f"Expected values of one kind in the column {name!r} of the picks, got {error}."
            ) from error
    return pa.table(columns)


def _no_nan(value: Any) -> Any:
    """NaN as null, as everywhere in a result: JSON does not know it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _no_nan(one) for key, one in value.items()}
    return [_no_nan(one) for one in value] if isinstance(value, list) else value


def describe(
    result: SelectionResult,
    exemplars: Mapping[int, Sequence[str]] | None = None,
    *,
    n_picks: int = 10,
) -> str:
    """The first picks with their reasons, as lines for people.

    Args:
        exemplars: latent to the tokens on which it fires most, see ``top_tokens``; None shows the
            latents by number.
        n_picks: picks to show.
    """
    lines = []
    shown = result.picks.slice(0, n_picks).to_pylist()
    for pick, reason in zip(shown, result.reasons.slice(0, n_picks).to_pylist(), strict=True):
        lines.append(
            f"{pick['rank'] + 1:>4}. row {pick['row_id']}  score {pick['score']:.4f}  "
            f"group {pick['group']}  {pick['n_tokens']} tokens"
        )
        for latent, share in zip(reason["latents"], reason["shares"], strict=True):
            tokens = ", ".join(repr(token) for token in (exemplars or {}).get(latent, ()))
            lines.append(
                f"        {share:6.1%}  latent {latent}" + (f": {tokens}" if tokens else "")
            )
    return "\n".join(lines)
