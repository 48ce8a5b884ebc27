"""The values of units along labelled texts, batch by batch, as often as they are asked for."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Int

from sae_core.activations import HarvestConfig, stream_activations
from sae_core.models import LanguageModel
from sae_core.text import rows_from_texts

from .bins import Values
from .concepts import LabelledTexts
from .measure import Stream
from .units import Units


def unit_stream(
    lm: LanguageModel,
    units: Units,
    data: LabelledTexts,
    config: HarvestConfig | None = None,
    progress: Callable[[int], None] | None = None,
) -> Stream:
    """Passes over the texts: values of every unit, with the place of each token's text.

    Special tokens and the first of a chunk, an attention sink, are left out unless ``config`` says
    otherwise. Every pass runs the model again, so that memory does not grow with the texts.

    Args:
        lm: the model.
        units: what is read.
        data: the texts.
        config: chunks, batches, tokens; None: the defaults of harvesting.
        progress: called with the tokens of each batch.
    """
    config = config or HarvestConfig()
    source = rows_from_texts(list(data.texts))

    def stream() -> Iterator[tuple[Values, Int[np.ndarray, "n"]]]:
        for found in stream_activations(lm, source, [units.hook_point], config):
            batch = found[units.hook_point]
            yield units.values(batch.x.float()), batch.row_id.numpy()
            if progress is not None:
                progress(len(batch))

    return stream
