"""JSON records that carry the sha256 of their own content, so that a damaged one is refused.

Folders have manifests; a record that stands alone (a line of a journal, ``run.json``) has nothing
beside it that could tell a flipped digit from a true one.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from sae_core.errors import CorruptFileError

SEAL = "seal"


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the key ``seal`` behind its own."""
    return {**record, SEAL: _digest(record)}


def unsealed(record: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The record without the key ``seal``; one that never had it passes, as files of old do.

    Args:
        where: file or line, for the message.
    Raises:
        CorruptFileError: the content is not what was sealed.
    """
    content = {key: value for key, value in record.items() if key != SEAL}
    if SEAL in record and record[SEAL] != (found := _digest(content)):
        raise CorruptFileError(
            f"{where} was altered: expected sha256 {str(record[SEAL])[:64]}, got {found}."
        )
    return content


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(json.loads(json.dumps(dict(record))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
