"""Places, prompts, SAEs and cached place vectors of the benchmark of geography.

What a place's vector depends on (model and its dtype, places, prompt, hook point) makes up the name
of its file in the cache folder, so that a changed setting can never meet an old file. Pooled
activations are kept; codes are kept where tokens were pooled as codes, else they are encoded from
the activations, which takes seconds.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse

from benchmarks.geography_saes import GEMMA_LAYERS, gemma_saes, load_gemma
from benchmarks.sae_quality import HOOK
from benchmarks.selection_data import saes
from benchmarks.selection_layers import LAYERS, layer_saes
from sae_apps.geospatial.controls import untrained
from sae_apps.geospatial.places import Places, default_crs, load_places
from sae_apps.geospatial.probe import encode_units, probe_saes, probe_units, row_table
from sae_apps.geospatial.prompts import PRESETS, ProbeConfig, place_prompts
from sae_apps.geospatial.weights import SpatialWeights, spatial_weights
from sae_core.download import cache_dir
from sae_core.features import SparseFeatures
from sae_core.models import LanguageModel, load_model
from sae_core.provenance import Provenance, package_versions
from sae_core.sae import SAE

AREAS = ("world", "GB", "IT", "US:NY+NJ+CT+PA")
FRESH = ("FR", "DE")  # looked at once, with what was chosen on AREAS; their largest places
LIMITS = {"reduced": 1500, "full": None}
FRESH_LIMIT = 3000
# where the careful procedure looks; the first is the default of the rest
PROMPTS = {
    "name": ProbeConfig("The city of {name}"),
    "name, mean": ProbeConfig("The city of {name}", pooling="mean"),
    "next": PRESETS["question"],
}
ASKED = {  # "ask": the question whose answer would be the label, read at its end
    "world": "The city of {name} is in the country of",
    "GB": "The British town of {name} is in the county of",
    "IT": "The Italian town of {name} is in the region of",
    "US:NY+NJ+CT+PA": "The American town of {name} is in the state of",
    "FR": "The French town of {name} is in the region of",
    "DE": "The German town of {name} is in the state of",
}
PROMPT_NAMES = (*PROMPTS, "ask")
LABELLED = {
    "published": PRESETS["published"],
    "label": ProbeConfig("{name}, {label}", "all", "mean", bos=True),
}


def prompt_of(name: str, area: str) -> ProbeConfig:
    """The settings of a prompt, of which "ask" depends on the area."""
    return ProbeConfig(ASKED[area], tokens="all") if name == "ask" else PROMPTS[name]


class Spot(NamedTuple):
    """Where the findings look: a layer, a prompt, and the SAEs of that layer."""

    layer: int
    prompt: str
    saes: tuple[str, ...]
    """The first is described, the others stand beside it."""


@dataclass(frozen=True)
class Study:
    """What is looked at in one model."""

    layers: dict[int, str]
    """Layer to the SAE of the comparison by layer, all trained alike."""
    main: dict[str, tuple[Spot, ...]]
    """Area to the spots of the findings."""
    published: tuple[int, ...]
    """Layers of the published preset: as deep as 7, 15 and 31 of 32."""
    norm: str
    """The norm before the MLP, whose output the published study read."""


_SMOLLM2 = (Spot(15, "name", ("gba-15", "topk-15")), Spot(28, "ask", ("gba-28 262k",)))
_GEMMA = (Spot(15, "name", ("gba-15", "topk-15")), Spot(15, "ask", ("gba-15", "topk-15")))
STUDIES = {
    "smollm2": Study(
        {n: f"gba-{n} 262k" for n in LAYERS},
        dict.fromkeys((*AREAS, *FRESH), _SMOLLM2),
        (7, 15, 29),
        "post_attention_layernorm",
    ),
    "gemma": Study(
        {n: f"gba-{n}" for n in GEMMA_LAYERS},
        dict.fromkeys((*AREAS, *FRESH), _GEMMA),
        (4, 8, 17),
        "pre_feedforward_layernorm",
    ),
}
SHUFFLE_SEED = 0


def residual(layer: int) -> str:
    """The residual stream behind a block."""
    return f"layers.{layer}.out"


def neurons(layer: int) -> str:
    """What a Llama-like MLP's neurons write: act(gate) * up."""
    return f"model.layers.{layer}.mlp.down_proj.in"


def normalised(study: Study, layer: int) -> str:
    """Where the published study read: the input of the MLP behind its RMS norm."""
    return f"model.layers.{layer}.{study.norm}.out"


@dataclass(frozen=True, eq=False)
class Lab:
    """The model, its control, and the SAEs; each loaded once."""

    model: str
    """smollm2 or gemma."""
    lm: LanguageModel
    random: LanguageModel
    """The control: random weights."""
    saes: dict[str, tuple[SAE, str]]
    """Name to SAE and hook point."""
    folder: Path
    """Where vectors are kept."""
    size: str
    limit: int | None
    """At most so many places an area."""
    _areas: dict[str, tuple[Places, SpatialWeights]] = field(default_factory=dict)

    @property
    def study(self) -> Study:
        """What is looked at."""
        return STUDIES[self.model]

    def area(self, name: str) -> tuple[Places, SpatialWeights]:
        """Places with eight neighbours on the sphere."""
        if name not in self._areas:
            limit = self.limit or (FRESH_LIMIT if name in FRESH else None)
            places = load_places(name, limit=limit)
            self._areas[name] = places, spatial_weights(places, k=8)
        return self._areas[name]


def open_lab(model: str, size: str, limit: int | None = None, *, by_layer: bool = True) -> Lab:
    """Load what every part needs; SAEs are trained if they are not in the cache.

    Args:
        by_layer: SmolLM2's SAEs of every layer too, not those of layer 15 alone.
    """
    if model == "gemma":
        lm = load_gemma()
        found = {name: (sae, hook) for name, (hook, sae) in gemma_saes(lm).items()}
    else:
        lm = load_model("smollm2-135m", dtype=torch.bfloat16)
        found = {f"{name}-15": (sae, HOOK) for name, sae in saes().items()}
        folder = cache_dir() / "benchmarks" / "selection-layers"
        for name, sae in (layer_saes(lm, folder) if by_layer else {}).items():
            layer = int(name.removeprefix("layer"))
            found[f"gba-{layer} 262k"] = sae, residual(layer)
    folder = cache_dir() / "benchmarks" / "geography" / "vectors"
    folder.mkdir(parents=True, exist_ok=True)
    return Lab(model, lm, untrained(lm), found, folder, size, limit or LIMITS[size])


def planar(places: Places) -> SpatialWeights:
    """The published weights: eight neighbours on a projected plane, where one is known."""
    return spatial_weights(places, k=8, metric="planar", crs=default_crs(places))


def units_of(
    lab: Lab, lm: LanguageModel, places: Places, config: ProbeConfig, hooks: Iterable[str]
) -> dict[str, np.ndarray]:
    """Pooled activations at hook points, [n, d_in] float32 each; absent ones in one pass."""
    files = {hook: lab.folder / f"{_key(lm, places, config, hook)}.npy" for hook in hooks}
    absent = [hook for hook, file in files.items() if not file.exists()]
    if absent:
        for hook, values in probe_units(lm, absent, places, config).items():
            temp = files[hook].with_suffix(".tmp.npy")
            np.save(temp, values)
            temp.replace(files[hook])
    return {hook: np.load(file) for hook, file in files.items()}


def codes_of(
    lab: Lab, places: Places, config: ProbeConfig, names: Iterable[str]
) -> dict[str, SparseFeatures]:
    """Features of the places by SAE."""
    chosen = {name: lab.saes[name] for name in names}
    if config.pooling == "last" or config.pool_in == "activations":
        hooks = dict.fromkeys(hook for _, hook in chosen.values())
        units = units_of(lab, lab.lm, places, config, hooks)
        acts = {
            name: encode_units(lab.lm, sae, hook, units[hook])
            for name, (sae, hook) in chosen.items()
        }
    else:
        acts = _pooled_codes(lab, places, config, chosen)
    table = row_table(places, place_prompts(lab.lm.tokenizer, places, config))
    return {
        name: SparseFeatures(found, table, _origin(lab, places, config, *chosen[name]))
        for name, found in acts.items()
    }


def shuffled(config: ProbeConfig) -> ProbeConfig:
    """The control: the tokens of every name in another order."""
    return replace(config, shuffle_seed=SHUFFLE_SEED)


def _pooled_codes(
    lab: Lab, places: Places, config: ProbeConfig, chosen: Mapping[str, tuple[SAE, str]]
) -> dict[str, sparse.csr_array]:
    files = {
        name: lab.folder / f"{_key(lab.lm, places, config, f'{hook} {sae.hash()}')}.npz"
        for name, (sae, hook) in chosen.items()
    }
    absent = {name: chosen[name] for name, file in files.items() if not file.exists()}
    if absent:
        for name, found in probe_saes(lab.lm, absent, places, config).items():
            temp = files[name].with_suffix(".tmp.npz")
            sparse.save_npz(temp, found.acts)
            temp.replace(files[name])
    return {name: sparse.csr_array(sparse.load_npz(file)) for name, file in files.items()}


def _key(lm: LanguageModel, places: Places, config: ProbeConfig, what: str) -> str:
    """A digest of everything that a vector depends on."""
    rows = hashlib.sha256(places.row_id.tobytes() + "\n".join(places.name).encode())
    rows.update(json.dumps(places.label).encode())
    facts = [
        lm.model_id, lm.revision, str(lm.model.dtype), rows.hexdigest(), config.describe(), what,
        package_versions("torch", "transformers"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def _origin(lab: Lab, places: Places, config: ProbeConfig, sae: SAE, hook: str) -> Provenance:
    return Provenance(
        model_id=lab.lm.model_id, model_revision=lab.lm.revision, hook_point=hook,
        sae_hash=sae.hash(), data_id=f"{places.source} [{config.describe()}]", seed="none",
        versions=package_versions("sae-apps", "torch", "transformers"),
    )  # fmt: skip
