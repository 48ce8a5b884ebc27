"""A fitted suppression: chosen units, their look-up tables, and the edit that they make.

    a_j' = a_j - s w_j(a_j) (a_j - neutral_j)        gate "unit"
    a_j' = a_j - s w(t)     (a_j - neutral_j)        gate "joint": one weight for a token

s is the strength, w_j the attenuation of ``posterior`` (APP, arXiv 2508.15094), w(t) that of the
tempered naive Bayes of all units (this project's extension, see ``calibration``). neutral_j is 0
for latents and the mean outside the concepts for units of both signs. Above s = 1, ``overshoot``
pushes a unit beyond its neutral value, while ``clip`` bounds s w at 1: full masking is its limit.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_apps.suppression.posterior import MODES
from sae_apps.suppression.reader import LatentReader
from sae_apps.suppression.units import KINDS, Units
from sae_core.errors import UserError
from sae_core.store import atomic_folder, verify_folder
from sae_core.untrusted import read_object, reading

GATES = ("unit", "joint")
BEYOND = ("overshoot", "clip")
_READER = ("encoder", "offset", "threshold", "gate_bias", "chosen", "decoder")


@dataclass(frozen=True, eq=False)
class App:
    """Attenuation based on posterior probabilities: an edit for ``suppress``."""

    units: Units
    """The chosen units."""
    edges: Float[Tensor, "u B_minus_1"]
    """Edges of the bins of each unit."""
    weights: Float[Tensor, "u B_plus_1"]
    """w_j by bin, in [0, 1]; bin 0 is the atom."""
    evidence: Float[Tensor, "u B_plus_1"]
    """Joint gate: T times the log-odds of the concepts by bin, less those of the prior."""
    neutral: Float[Tensor, " u"]
    """Value that a unit is moved to."""
    prior: float
    """Of the concepts together."""
    concepts: tuple[str, ...]
    """What is suppressed."""
    mode: str = "excess"
    """excess or posterior."""
    gate: str = "unit"
    """unit or joint."""
    beyond: str = "overshoot"
    """What a strength above 1 does: overshoot or clip."""
    strength: float = 1.0
    """s."""
    special_ids: tuple[int, ...] = ()
    """Tokens that neither fitting nor the scope text of ``suppress`` touches."""

    def __post_init__(self) -> None:
        for name, known in (("mode", MODES), ("gate", GATES), ("beyond", BEYOND)):
            if getattr(self, name) not in known:
                raise UserError(f"Expected a {name} of {known}, got {getattr(self, name)!r}.")
        if not 0 <= self.strength < float("inf"):
            raise UserError(f"Expected a strength of at least 0, got {self.strength}.")

    @property
    def hook_point(self) -> str:
        """Where it works."""
        return self.units.hook_point

    @property
    def model_id(self) -> str:
        """The language model it was fitted on."""
        return self.units.model_id

    @property
    def model_revision(self) -> str:
        """The weights it was fitted on."""
        return self.units.model_revision

    def weight(self, a: Float[Tensor, "n u"]) -> Float[Tensor, "n u"]:
        """Share w of each value that strength 1 takes away."""
        n_at_most = torch.searchsorted(self.edges, a.detach().T.contiguous(), right=True)
        place = n_at_most + 1  # of positive values: those of the atom are taken out below
        if not self.units.two_sided:
            place = place * (a.detach().T > 0)
        if self.gate == "unit":
            return self.weights.gather(1, place).T
        total = self.evidence.gather(1, place).sum(dim=0)
        logit = torch.logit(torch.tensor(self.prior, dtype=torch.float64)).item()
        p = torch.sigmoid(total + logit)
        if self.mode == "excess":
            p = ((p - self.prior) / (1 - self.prior)).clamp_min(0)
        return p[:, None].expand_as(a)

    def apply(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
        """Edited tokens; x in float32. Differentiable in x but for the steps of the tables."""
        if not self.units.n_units or not self.strength:
            return x
        a = self.units.values(x)
        assert isinstance(a, Tensor)
        share = self.strength * self.weight(a)
        if self.beyond == "clip":
            share = share.clamp_max(1)
        return self.units.write(x, a, a - share * (a - self.neutral))

    def to(self, device: torch.device | str) -> "App":
        """The same on another device."""
        names = ("edges", "weights", "evidence", "neutral")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, units=self.units.to(device), **moved)


def save_app(folder: str | Path, app: App, *, overwrite: bool = False) -> None:
    """Write ``app.safetensors`` and ``app.json``, atomically; neither model nor SAE is needed then.

    Raises:
        UserError: the folder is taken or may not be written.
    """
    units = app.units
    assert units.index is not None
    names = ("edges", "weights", "evidence", "neutral")
    tensors = {name: getattr(app, name) for name in names} | {"index": units.index}
    if units.reader is not None:
        tensors |= {f"reader.{name}": getattr(units.reader, name) for name in _READER}
    facts = {name: getattr(app, name) for name in _FACTS}
    facts["units"] = {name: getattr(units, name) for name in _UNIT_FACTS}
    if units.reader is not None:
        facts["reader"] = {"normalize": units.reader.normalize, "k": units.reader.k}
    with atomic_folder(folder, overwrite=overwrite) as temp:
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
        save_file(whole, temp / "app.safetensors")
        (temp / "app.json").write_text(json.dumps(facts, indent=1, sort_keys=True), "utf-8")


_FACTS = ("prior", "concepts", "mode", "gate", "beyond", "strength", "special_ids")
_UNIT_FACTS = ("kind", "hook_point", "d_in", "model_id", "model_revision", "sae_hash")


def load_app(folder: str | Path) -> App:
    """Read what ``save_app`` wrote, onto the CPU; ``suppress`` moves it to the model.

    Raises:
        UserError: no such folder; CorruptFileError: a file that is damaged or no App.
    """
    folder = Path(folder)
    verify_folder(folder)
    with reading("an App", folder):
        facts = read_object(folder / "app.json")
        tensors = load_file(folder / "app.safetensors")
        index = tensors.pop("index")
        parts = {name: tensors.pop(f"reader.{name}") for name in _READER if "reader" in facts}
        reader = LatentReader(**parts, **facts.pop("reader")) if parts else None
        known = facts.pop("units")
        if known["kind"] not in KINDS:
            raise KeyError(known["kind"])
        _check_units(index, known, reader)
        _check_tables(tensors, len(index))
        units = Units(**known, n_units=len(index), index=index, reader=reader)
        for name in ("concepts", "special_ids"):
            facts[name] = tuple(facts[name])
        return App(units=units, **tensors, **facts)


def _check_units(index: Tensor, known: dict, reader: LatentReader | None) -> None:
    """Numbers of units that lead out of a tensor would be read wherever they point."""
    d_in, n_units, width = int(known["d_in"]), len(index), int(known["d_in"])
    if not 0 < d_in < 1 << 24:
        raise ValueError(f"activations of width {d_in}")
    _check("index", index, (n_units,), _WHOLE)
    if reader is not None:
        if type(reader.k) is not int or reader.k < 0:
            raise ValueError(f"k {reader.k!r}")
        width = reader.encoder.shape[-1] if reader.k else n_units
        _check("reader.encoder", reader.encoder, (d_in, width))
        _check("reader.decoder", reader.decoder, (n_units, d_in))
        _check("reader.chosen", reader.chosen, (n_units,), _WHOLE)
        for name in ("offset", "threshold", "gate_bias"):
            _check(f"reader.{name}", getattr(reader, name), (width,))
    places = index if reader is None else reader.chosen
    if n_units and not 0 <= int(places.min()) <= int(places.max()) < width:
        raise ValueError(f"units {int(places.min())} to {int(places.max())} of {width}")


def _check_tables(tables: dict[str, Tensor], n_units: int) -> None:
    """Tables that fit neither the units nor each other would fail at the first token only."""
    n_bins = tables["weights"].shape[-1]
    for name, columns in (("weights", n_bins), ("evidence", n_bins), ("edges", n_bins - 2)):
        _check(name, tables[name], (n_units, columns))
    _check("neutral", tables["neutral"], (n_units,))


_FLOAT, _WHOLE = (torch.float32, torch.float64), (torch.int32, torch.int64)


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], types: tuple[torch.dtype, ...] = _FLOAT
) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype not in types:
        raise ValueError(
            f"{name} of shape {list(tensor.shape)} and {tensor.dtype} where {list(shape)} belongs"
        )
