"""Hook points under TransformerLens's names, where the two places carry the same vectors.

`layers.<n>.out` is `blocks.<n>.hook_resid_post`, provided that TransformerLens loaded the model
without processing (HookedTransformer.from_pretrained_no_processing): its default centres the
weights that write to the residual stream.
"""

import re

_SIDES = {
    "in": "hook_resid_pre",
    "out": "hook_resid_post",
    "mlp.out": "hook_mlp_out",
    "attn.out": "hook_attn_out",
}


def to_transformer_lens(hook_point: str) -> str | None:
    """`layers.8.out` -> `blocks.8.hook_resid_post`; None where there is no such name."""
    match = re.fullmatch(r"layers\.(\d+)\.([\w.]+)", hook_point)
    if match is None or match[2] not in _SIDES:
        return None
    return f"blocks.{match[1]}.{_SIDES[match[2]]}"


def from_transformer_lens(hook_name: str) -> str | None:
    """`blocks.8.hook_resid_post` -> `layers.8.out`; None where there is no such name."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook_name)
    side = match and {name: side for side, name in _SIDES.items()}.get(match[2])
    return f"layers.{match[1]}.{side}" if match and side else None
