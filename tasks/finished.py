"""A folder that a command wrote before: its summary, if it is whole and of the same settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_core.errors import UserError
from sae_core.store import MANIFEST, recover_folder, verify_folder

from .common import first_difference, read_json

SUMMARY = "summary.json"


def finished_folder(
    out: Path, identity: Mapping[str, Any], form: str, version: int
) -> dict[str, Any] | None:
    """The summary in ``out``; None where nothing is there.

    Args:
        identity: everything that the result depends on, as JSON types.
        form: name of the command's format; version: its number.
    Raises:
        UserError: the folder holds something else; CorruptFileError: a file has changed since.
    """
    recover_folder(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    advice = "choose another --out or add --overwrite"
    if not (out / SUMMARY).is_file() or not (out / MANIFEST).is_file():
        raise UserError(f"{out} is there already, without a {SUMMARY} of this command: {advice}.")
    found = read_json(out / SUMMARY)
    if (found.get("format"), found.get("version")) != (form, version):
        raise UserError(f"{out} is there already, from another program: {advice}.")
    if difference := first_difference(found["identity"], identity):
        raise UserError(f"{out} holds another result: {difference}; {advice}.")
    verify_folder(out)
    return found["summary"]
