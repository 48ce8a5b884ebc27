"""Start a forward pass in the middle: blocks whose result is known are passed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from sae_core.errors import UserError
from sae_core.hooks import HookPoint, decoder_blocks, replace_value


@contextmanager
def resume_from(
    model: nn.Module, point: HookPoint, value: Float[Tensor, "b t d"]
) -> Iterator[None]:
    """While the block runs, passes have ``value`` at the output of a block and skip all before it.

    For models whose blocks return their hidden states as a tensor (transformers >= 4.56). What a
    skipped block would have put into a cache is missing, so call with ``use_cache=False``.

    Args:
        model: the model that the point was resolved in.
        point: the output of a block, e.g. ``layers.15.out``.
        value: of every pass in the block.
    Raises:
        UserError: the point is no output of a block.
    """
    path, blocks = decoder_blocks(model)
    layer = layer_of(point, path)
    if layer is None:
        raise UserError(f"Expected the output of a block, e.g. 'layers.3.out', got {point.name!r}.")
    skipped = list(blocks)[: layer + 1]
    try:
        for block in skipped:
            block.forward = _hand_on
        with replace_value(model, point, lambda _: value):
            yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)


def layer_of(point: HookPoint, blocks_path: str) -> int | None:
    """Number of the block whose output this is; None for any other place."""
    head, _, tail = point.path.rpartition(".")
    is_block = head == blocks_path and tail.isdigit() and point.side == "out"
    return int(tail) if is_block else None


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
