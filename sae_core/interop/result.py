"""What a conversion gives, and what the file that was read computes in its own terms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sae_core.sae import SAE


@dataclass(frozen=True)
class Converted:
    """An SAE out of another library's files."""

    sae: SAE
    """The same codes and reconstructions, checked against the file's own formula."""
    notes: tuple[str, ...]
    """What was folded, and what could not be carried, one sentence each."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the files say about the SAE, under the names that `save_sae` keeps: model_id,
    hook_point, freq, and converted_from."""


@dataclass(frozen=True)
class Original:
    """The formula of a file in float64, written from the library's source, not through `SAE`."""

    encode: Callable[[Tensor], Tensor]
    """x [n, d_in] -> codes [n, d_sae]."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """(codes [n, d_sae], x [n, d_in]) -> reconstruction [n, d_in]; x gives the norms that a
    normalised input is multiplied by again."""
