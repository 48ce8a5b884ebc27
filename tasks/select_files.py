"""The files of ``sae-apps select``: the picks, what they come from, the scores of all rows.

NAME.jsonl       the original records of the picks, best first, each with the key ``_sae_apps``:
                 {"rank": 0, "score": 0.71, "row_id": 12, "group": "all",
                  "reasons": [{"latent": 5, "share": 0.2, "tokens": "apples | fruit"}, ...]}
NAME.meta.json   the settings, the identity of everything read, the summary, the files' sha256

``_sae_apps`` has the same types in every record, so that ``datasets.load_dataset("json",
data_files="NAME.jsonl")`` reads the file as it is: rank, row_id and latent int64, score and share
float64, group and tokens string. ``group`` is the prototype that the row was picked for: all, the
group's name, or GROUP:ROW_ID of the nearest target where every target is a prototype.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sae_core.disk import atomic_write_text, disk_errors, owner_tag, remove_stale, replaced_file
from sae_core.download import sha256_file
from sae_core.errors import UserError
from sae_core.sealed import sealed

from .common import first_difference, plain, read_json, to_json

if TYPE_CHECKING:
    from sae_apps.selection.result import SelectionResult

FORMAT, VERSION = "sae-apps-picks", 1
KEY = "_sae_apps"


@dataclass(frozen=True)
class Output:
    """Where the picks go."""

    picks: Path
    """Ends in .jsonl."""
    scores: Path | None = None
    """Ends in .parquet; None: not written."""

    def __post_init__(self) -> None:
        for flag, path, suffix in (
            ("--out", self.picks, ".jsonl"),
            ("--scores", self.scores, ".parquet"),
        ):
            if path is not None and path.suffix != suffix:
                raise UserError(f"{flag} must name a file that ends in {suffix}, got {path}.")
            if path is not None and path.is_dir():
                raise UserError(f"{flag} must name a file, got the folder {path}.")

    @property
    def meta(self) -> Path:
        """The file beside the picks."""
        return self.picks.with_suffix(".meta.json")

    @property
    def data(self) -> dict[str, Path]:
        """The files whose sha256 the file beside the picks holds."""
        return {"picks": self.picks} | ({"scores": self.scores} if self.scores else {})


def check_free(output: Output, identity: Mapping[str, Any], *, overwrite: bool) -> dict | None:
    """What the same command wrote there before, whole; None where it is still to be written.

    Raises:
        UserError: a file is there that another command wrote, or that has changed since, and
            ``overwrite`` is not set.
    """
    there = [path for path in (output.meta, *output.data.values()) if path.exists()]
    if overwrite or not there:
        return None
    advice = "choose another name or add --overwrite"
    if not output.meta.is_file():
        raise UserError(f"{there[0]} is there already, without {output.meta}: {advice}.")
    meta = read_json(output.meta)
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{output.meta} is there already, from another program: {advice}.")
    if difference := first_difference(meta["identity"], identity):
        raise UserError(f"{output.picks} holds other picks: {difference}; {advice}.")
    is_whole = True
    for name, path in output.data.items():
        known = meta["files"].get(name)
        if path.is_file() and (known is None or sha256_file(path) != known["sha256"]):
            raise UserError(f"{path} is not what this command wrote: {advice}.")
        is_whole = is_whole and path.is_file()
    return meta if is_whole else None


def write_files(
    output: Output,
    result: "SelectionResult",
    identity: Mapping[str, Any],
    summary: Mapping[str, Any],
    tokens: Mapping[int, Sequence[str]],
) -> None:
    """Write all files. Each is whole or absent; data without the file beside it never occurs.

    Args:
        tokens: latent to the tokens on which it fires most.
    Raises:
        UserError: the disk is full, a folder may not be written, or a record has the key already.
    """
    import pyarrow.parquet as pq

    files: dict[str, dict[str, Any]] = {}
    with disk_errors(output.picks), ExitStack() as renamed_at_the_end:
        for name, path in output.data.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(path)
            temp = path.with_name(f".{path.name}.{owner_tag('tmp')}")
            file = renamed_at_the_end.enter_context(replaced_file(path, temp))
            if name == "scores":
                pq.write_table(result.scores, file)
            else:
                _write_lines(file, result, tokens)
            file.flush()
            files[name] = {"sha256": sha256_file(temp), "bytes": temp.stat().st_size}
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "identity": identity,
            "summary": summary,
            "files": files,
        }
        atomic_write_text(output.meta, to_json(sealed(plain(meta))) + "\n")


def _write_lines(
    file: IO[bytes], result: "SelectionResult", tokens: Mapping[int, Sequence[str]]
) -> None:
    for record in pick_records(result, tokens):
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False, default=str)
        file.write(line.encode("utf-8", "surrogatepass") + b"\n")


def pick_records(
    result: "SelectionResult", tokens: Mapping[int, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    """The original records of the picks with the key ``_sae_apps``, best first.

    Raises:
        UserError: a record has the key already.
    """
    picks = {row["row_id"]: row for row in result.picks.to_pylist()}
    reasons = {row["row_id"]: row for row in result.reasons.to_pylist()}
    assert result.source is not None  # the command always gives it
    found = {row.row_id: row.record for row in result.source if row.row_id in picks}
    for row_id, pick in picks.items():
        if KEY in found[row_id]:
            raise UserError(f"Expected records without the key {KEY!r}, got it in row {row_id}.")
        why = reasons[row_id]
        yield found[row_id] | {
            KEY: {
                "rank": int(pick["rank"]),
                "score": float(pick["score"]),
                "row_id": row_id,
                "group": str(pick["group"]),
                "reasons": [
                    {
                        "latent": int(latent),
                        "share": float(share),
                        # one string: an empty list would have another type than a full one
                        "tokens": " | ".join(tokens.get(latent, ())),
                    }
                    for latent, share in zip(why["latents"], why["shares"], strict=True)
                ],
            }
        }


def digest(facts: Any) -> str:
    """Twelve hex digits that change with any of the facts."""
    text = json.dumps(plain(facts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
