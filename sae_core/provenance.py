"""Where a result comes from: model, hook point, SAE, data, seed, versions."""

from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version

from sae_core.errors import UserError


def package_versions(*names: str) -> str:
    """Versions as one line, e.g. ``sae-apps 0.1.0, torch 2.13.0``, or ``torch absent``."""

    def one(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} absent"

    return ", ".join(one(name) for name in names)


@dataclass(frozen=True)
class Provenance:
    """Identity of everything that produced an array. Every field is a non-empty string."""

    model_id: str
    """Hub id, folder or file of the language model, or ``none`` for data without a model."""
    model_revision: str
    """Commit or sha256 of the weights."""
    hook_point: str
    """Where the activations were read, e.g. ``layers.15.out``."""
    sae_hash: str
    """sha256 of the SAE's weights and configuration, or ``none`` for raw activations."""
    data_id: str
    """The text source, e.g. ``demo`` or a file name with its sha256."""
    seed: str
    versions: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not value:
                raise UserError(
                    f"Provenance.{field.name} must be a non-empty string, got {value!r}."
                )

    def to_dict(self) -> dict[str, str]:
        return asdict(self)
