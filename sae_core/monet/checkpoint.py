"""Folders of Monet models: transformers learns the type, tensors that do not fit are refused."""

from typing import Any

from sae_core.errors import UserError

MAX_LAYERS = 1024
"""Eight times the deepest language model; transformers builds so many in seconds."""
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def register_if_monet(source: str, common: dict[str, Any]) -> bool:
    """Whether config.json says ``monet``; then transformers is told of the classes here.

    Args:
        source: folder or hub id.
        common: how transformers is to fetch it.
    Raises:
        UserError: config.json claims layers without end, of this or another type; transformers
            would build them all before it looked at a weight.
    """
    from transformers import PretrainedConfig

    found, _ = PretrainedConfig.get_config_dict(source, **common)
    for part in (found, found.get("text_config")):
        depths = [part.get(name) for name in _DEPTHS] if isinstance(part, dict) else []
        if many := [n for n in depths if isinstance(n, int | float) and n > MAX_LAYERS]:
            raise UserError(f"Expected at most {MAX_LAYERS} layers of {source}, got {many[0]:,}.")
    if found.get("model_type") != "monet":
        return False
    from sae_core.monet.model import register

    register()
    return True


def refuse_extra(source: str, info: dict[str, Any]) -> None:
    """A tensor without a place says that config.json is of another model.

    Raises:
        UserError: transformers found tensors that the model does not have.
    """
    if extra := sorted(info["unexpected_keys"]):
        raise UserError(
            f"The weights of {source} hold {len(extra)} tensors that no Monet of its config.json "
            f"has, the first {extra[0]}."
        )
