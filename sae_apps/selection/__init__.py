"""Pick the rows of an instruction pool that look most like targets to the latents of an SAE.

MONA (arXiv 2503.15573) exactly, and improvements that were measured one by one; sparse similarity
that is exact and fast, a FAISS index for the rest, and the reasons for every pick.
"""

from sae_apps.selection.browse import top_latents, top_rows
from sae_apps.selection.config import SelectConfig
from sae_apps.selection.contamination import contamination
from sae_apps.selection.duplicates import exact_duplicates, near_duplicates
from sae_apps.selection.embed import EmbedConfig, Encoder, encode, load_encoder
from sae_apps.selection.index import SparseIndex
from sae_apps.selection.instructions import open_instructions
from sae_apps.selection.pool import PoolFeatures, open_pool, write_pool
from sae_apps.selection.result import SelectionResult, describe
from sae_apps.selection.select import select
from sae_apps.selection.similarity import explain, idf, nearest, score
from sae_apps.selection.tokens import top_tokens

__all__ = [
    "EmbedConfig",
    "Encoder",
    "PoolFeatures",
    "SelectConfig",
    "SelectionResult",
    "SparseIndex",
    "contamination",
    "describe",
    "encode",
    "exact_duplicates",
    "explain",
    "idf",
    "load_encoder",
    "near_duplicates",
    "nearest",
    "open_instructions",
    "open_pool",
    "score",
    "select",
    "top_latents",
    "top_rows",
    "top_tokens",
    "write_pool",
]
