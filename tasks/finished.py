"""A folder that a command wrote before, and how a command with a plan goes about its work."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_core.errors import CorruptFileError, UserError
from sae_core.store import MANIFEST, recover_folder, verify_folder
from sae_core.untrusted import reading

from .common import first_difference, read_json

LOG = logging.getLogger(__name__)
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
    if lacking := [key for key in ("identity", "summary") if not isinstance(found.get(key), dict)]:
        raise CorruptFileError(f"{out / SUMMARY}: expected an object under {lacking[0]}, got none.")
    if difference := first_difference(found["identity"], identity):
        raise UserError(f"{out} holds another result: {difference}; {advice}.")
    verify_folder(out)
    return found["summary"]


def carry_out(
    steps: ModuleType, plan: Any, *, dry_run: bool, overwrite: bool, **options: Any
) -> tuple[Any, str]:
    """Estimate, show what is there already, or run; the result and its lines for people.

    Args:
        steps: module with ``estimate``, ``estimate_text``, ``finished``, ``run`` and ``as_text``.
        plan: what they take, with the folder ``out``.
        options: further ones of ``run``.
    """
    if dry_run:
        report = steps.estimate(plan)
        return report, steps.estimate_text(report)
    if not overwrite and (found := steps.finished(plan)):
        with reading("a summary of this command", plan.out / SUMMARY):
            text = steps.as_text(found)
        LOG.info("%s holds this result already: nothing to do.", plan.out)
        return found, text
    summary = steps.run(plan, **options)
    return summary, steps.as_text(summary)
