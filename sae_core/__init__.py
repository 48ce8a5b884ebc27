"""Train sparse autoencoders on a language model and turn its activations into sparse features.

An SAE writes an activation vector x [d_in] as a sum of few out of d_sae directions,
x_hat = (acts * scale) W_dec + b_dec with most of acts [d_sae] zero. Group Bias Adaptation, the
default way to train one, sets how often each latent may fire instead of a sparsity penalty
(arXiv 2506.14002, with the conditions under which the true features are found); the reweighted
reconstruction loss is that of arXiv 2506.15963.

The names below are loaded on first use, so `import sae_core` is quick and loads no model library:

    from sae_core import HarvestConfig, SAE, SAEConfig, TrainConfig, batches, load_model, train

A public name wins over a module of the same name: `sae_core.train` is the function; the other names
of its module are reached by `from sae_core.train import StepRecord`.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares the two lists
    from sae_core.activations import Activations as Activations
    from sae_core.activations import replace_activations as replace_activations
    from sae_core.activations import stream_activations as stream_activations
    from sae_core.buffer import batches as batches
    from sae_core.buffer import shuffle_stream as shuffle_stream
    from sae_core.buffer import shuffle_streams as shuffle_streams
    from sae_core.checkpoint import load_checkpoint as load_checkpoint
    from sae_core.checkpoint import save_checkpoint as save_checkpoint
    from sae_core.conditions import Conditions as Conditions
    from sae_core.conditions import ConditionStats as ConditionStats
    from sae_core.conditions import measure_conditions as measure_conditions
    from sae_core.errors import CorruptFileError as CorruptFileError
    from sae_core.errors import MissingExtraError as MissingExtraError
    from sae_core.errors import UserError as UserError
    from sae_core.feature_shards import FeaturePlan as FeaturePlan
    from sae_core.feature_shards import featurize_to as featurize_to
    from sae_core.feature_workers import FeaturizerSpec as FeaturizerSpec
    from sae_core.feature_workers import featurize_ray as featurize_ray
    from sae_core.features import SparseFeatures as SparseFeatures
    from sae_core.featurize import featurize as featurize
    from sae_core.gba import GBAConfig as GBAConfig
    from sae_core.harvest import harvest_each as harvest_each
    from sae_core.harvest import harvest_shards as harvest_shards
    from sae_core.hooks import HookPoint as HookPoint
    from sae_core.hooks import resolve_hook_point as resolve_hook_point
    from sae_core.identifiability import Agreement as Agreement
    from sae_core.identifiability import Matching as Matching
    from sae_core.identifiability import agreement as agreement
    from sae_core.identifiability import chance_mcs as chance_mcs
    from sae_core.identifiability import chance_pw_mcc as chance_pw_mcc
    from sae_core.identifiability import consistency as consistency
    from sae_core.identifiability import feature_recovery_rate as feature_recovery_rate
    from sae_core.identifiability import max_cosine as max_cosine
    from sae_core.identifiability import mcs_shares as mcs_shares
    from sae_core.identifiability import mean_max_cosine as mean_max_cosine
    from sae_core.identifiability import pw_mcc as pw_mcc
    from sae_core.identifiability import top_fraction as top_fraction
    from sae_core.kernels.codes import Codes as Codes
    from sae_core.metrics import ReconstructionStats as ReconstructionStats
    from sae_core.metrics import evaluate as evaluate
    from sae_core.metrics import loss_recovered as loss_recovered
    from sae_core.models import LanguageModel as LanguageModel
    from sae_core.models import load_model as load_model
    from sae_core.provenance import Provenance as Provenance
    from sae_core.reweighting import WeightConfig as WeightConfig
    from sae_core.sae import SAE as SAE
    from sae_core.sae import SAEConfig as SAEConfig
    from sae_core.sae import SAEOutput as SAEOutput
    from sae_core.sae import load_sae as load_sae
    from sae_core.sae import save_sae as save_sae
    from sae_core.shards import ShardedActivations as ShardedActivations
    from sae_core.state import TrainConfig as TrainConfig
    from sae_core.store import load_features as load_features
    from sae_core.store import save_features as save_features
    from sae_core.synthetic import Planted as Planted
    from sae_core.synthetic import PlantedConfig as PlantedConfig
    from sae_core.synthetic import plant as plant
    from sae_core.text import TextRow as TextRow
    from sae_core.text import TextSource as TextSource
    from sae_core.text import read_text_file as read_text_file
    from sae_core.text import rows_from_texts as rows_from_texts
    from sae_core.text import split_rows as split_rows
    from sae_core.theory import Condition as Condition
    from sae_core.theory import judge as judge
    from sae_core.together import TrainJob as TrainJob
    from sae_core.together import train_together as train_together
    from sae_core.tokens import HarvestConfig as HarvestConfig
    from sae_core.train import StepRecord as StepRecord
    from sae_core.train import train as train
    from sae_core.verdict import Verdict as Verdict
    from sae_core.verdict import verdict as verdict

# public name -> the module below sae_core that it is loaded from
HOME = {
    "Activations": "activations",
    "replace_activations": "activations",
    "stream_activations": "activations",
    "batches": "buffer",
    "shuffle_stream": "buffer",
    "shuffle_streams": "buffer",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "ConditionStats": "conditions",
    "Conditions": "conditions",
    "measure_conditions": "conditions",
    "CorruptFileError": "errors",
    "MissingExtraError": "errors",
    "UserError": "errors",
    "FeaturePlan": "feature_shards",
    "featurize_to": "feature_shards",
    "FeaturizerSpec": "feature_workers",
    "featurize_ray": "feature_workers",
    "SparseFeatures": "features",
    "featurize": "featurize",
    "GBAConfig": "gba",
    "HookPoint": "hooks",
    "resolve_hook_point": "hooks",
    "Agreement": "identifiability",
    "Matching": "identifiability",
    "agreement": "identifiability",
    "chance_mcs": "identifiability",
    "chance_pw_mcc": "identifiability",
    "consistency": "identifiability",
    "feature_recovery_rate": "identifiability",
    "max_cosine": "identifiability",
    "mcs_shares": "identifiability",
    "mean_max_cosine": "identifiability",
    "pw_mcc": "identifiability",
    "top_fraction": "identifiability",
    "Codes": "kernels.codes",
    "ReconstructionStats": "metrics",
    "evaluate": "metrics",
    "loss_recovered": "metrics",
    "LanguageModel": "models",
    "load_model": "models",
    "Provenance": "provenance",
    "WeightConfig": "reweighting",
    "SAE": "sae",
    "SAEConfig": "sae",
    "SAEOutput": "sae",
    "load_sae": "sae",
    "save_sae": "sae",
    "ShardedActivations": "shards",
    "harvest_each": "harvest",
    "harvest_shards": "harvest",
    "TrainConfig": "state",
    "load_features": "store",
    "save_features": "store",
    "Planted": "synthetic",
    "PlantedConfig": "synthetic",
    "plant": "synthetic",
    "TextRow": "text",
    "TextSource": "text",
    "read_text_file": "text",
    "rows_from_texts": "text",
    "split_rows": "text",
    "Condition": "theory",
    "judge": "theory",
    "TrainJob": "together",
    "train_together": "together",
    "HarvestConfig": "tokens",
    "StepRecord": "train",
    "train": "train",
    "Verdict": "verdict",
    "verdict": "verdict",
}

__all__ = sorted(HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps a submodule from hiding the public function of its name (`train`, `featurize`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        # the import system binds each submodule that it loads to its package in this way
        if not (name in HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
