"""Settings of a selection: every deviation from the published method is a switch of its own."""

from dataclasses import dataclass

from sae_apps.selection import similarity
from sae_apps.selection.budget import LENGTHS, STRATEGIES
from sae_apps.selection.duplicates import SPANS
from sae_apps.selection.embed import EmbedConfig
from sae_apps.selection.prototypes import GROUPINGS
from sae_core.errors import UserError

PRESENCE = ("presence", "presence_plain")
MEASURES = (*similarity.METRICS, *PRESENCE)
WEIGHTS = ("none", "idf")
PRESETS = ("recommended", "mona")


@dataclass(frozen=True)
class SelectConfig:
    """How rows are scored and picked."""

    metric: str = "presence"
    """presence (see presence.py; presence_plain: nothing damped), jaccard (generalised; published),
    cosine, or l2 (minus the Euclidean distance)."""
    weights: str = "none"
    """idf: both sides are multiplied by log((N + 1) / (df + 1)) over the N rows of the pool."""
    prototypes: str = "each"
    """one: the mean of all targets; group: one mean a group of targets; each: every target."""
    strategy: str = "nearest"
    """topk with one prototype; with several nearest (mean of the three best scores), max (the
    best score) or round_robin (in turn for each)."""
    length: str = "none"
    """strata: bins of log2 length get their share of the pool; target_strata: of the targets."""
    exact_duplicates: bool = False
    """Leave out rows whose text occurred before."""
    near_duplicates: float | None = None
    """Leave out rows whose text is this similar to an earlier one, in (0, 1]; None: none."""
    duplicate_span: str = "all"
    """Text that decides about duplicates: all; prompt finds the same question, other answers."""
    embed: EmbedConfig | None = None
    """How rows become codes; None: as the encoder or the pool has it."""
    n_reasons: int = 5
    """Latents named for each pick."""
    seed: int = 0
    """Of the hashes that find near-duplicates; the scores have no chance in them."""

    def __post_init__(self) -> None:
        for name, known in (
            ("metric", MEASURES),
            ("weights", WEIGHTS),
            ("prototypes", GROUPINGS),
            ("strategy", STRATEGIES),
            ("length", LENGTHS),
            ("duplicate_span", SPANS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"Expected {name} to be one of {known}, got {getattr(self, name)!r}."
                )
        if (self.prototypes == "one") != (self.strategy == "topk"):
            raise UserError(
                "Expected the strategy 'topk' with prototypes 'one' and another with several, got "
                f"{self.strategy!r} with {self.prototypes!r}."
            )
        if self.metric in PRESENCE and self.weights != "none":
            raise UserError(
                f"Expected weights 'none' with metric {self.metric!r}, got {self.weights!r}."
            )
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise UserError(f"Expected near_duplicates in (0, 1], got {self.near_duplicates}.")
        if self.n_reasons < 0:
            raise UserError(f"Expected n_reasons of at least 0, got {self.n_reasons}.")

    @classmethod
    def preset(cls, name: str) -> "SelectConfig":
        """The published method exactly, as ``mona``, or the defaults, as ``recommended``.

        Raises:
            UserError: another name.
        """
        if name not in PRESETS:
            raise UserError(f"Expected a preset of {PRESETS}, got {name!r}.")
        if name == "recommended":
            return cls()
        return cls(
            metric="jaccard",
            weights="none",
            prototypes="one",
            strategy="topk",
            length="none",
            exact_duplicates=False,
            near_duplicates=None,
            embed=EmbedConfig(pooling="mean", span="all", special=True),
        )
