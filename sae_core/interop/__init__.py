"""SAEs of other libraries: read SAELens, sparsify and dictionary_learning, write SAELens.

Every conversion is checked against a float64 formula that is written from the other library's
source. docs/formats.md has the table of what is exact, what is folded and what is refused.
"""

from sae_core.interop.checks import ConversionError, Difference, check_conversion
from sae_core.interop.dictionary_learning import read_dictionary_learning
from sae_core.interop.foreign import foreign_format, read_foreign
from sae_core.interop.result import Converted, Original
from sae_core.interop.saelens import read_sae_lens
from sae_core.interop.saelens_write import write_sae_lens
from sae_core.interop.sparsify import read_sparsify

__all__ = [
    "ConversionError",
    "Converted",
    "Difference",
    "Original",
    "check_conversion",
    "foreign_format",
    "read_dictionary_learning",
    "read_foreign",
    "read_sae_lens",
    "read_sparsify",
    "write_sae_lens",
]
