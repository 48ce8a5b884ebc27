"""Features of the rows that a run was trained on, from its stored activations: no model runs."""

from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from sae_core.errors import UserError
from sae_core.provenance import Provenance, package_versions

from .progress import progress

if TYPE_CHECKING:
    from sae_core.features import SparseFeatures
    from sae_core.text import TextSource

    from .featurize import FinishedRun

BATCH = 4096  # tokens


def stored_rows(run: "FinishedRun") -> "TextSource":
    """The training rows whose tokens are all stored: the row that the token limit cut is left out.

    Raises:
        UserError: less than one whole row is stored, or the text has changed since.
    """
    from sae_core.shards import ShardedActivations
    from sae_core.text import TextSource, split_rows

    from .settings import open_source

    settings = run.settings
    folder = run.folder.activations / "train"
    stored = ShardedActivations.open(folder, run.hook_point, verify=True)
    source = open_source(settings.text)
    data_id = run.folder.read()["provenance"]["data_id"]
    if source.id != data_id:
        raise UserError(f"Expected the text {data_id} of the run, got {source.id}.")
    rows, _ = split_rows(source, settings.text.held_out_frac, settings.split_seed)
    if settings.max_tokens is None:
        return rows
    # Rows are stored in the order of the text, whose numbers rise; only the last can be cut.
    last = int(max(ids.max() for _, ids, _ in stored.maps))
    before = partial(_before, rows, last)
    if next(iter(before()), None) is None:
        raise UserError(
            f"Expected whole rows among the {stored.n_tokens} stored tokens, got a part of one."
        )
    return TextSource(f"{rows.id}[rows before {last}]", before)


def _before(rows: "TextSource", last: int) -> takewhile:
    return takewhile(lambda row: row.row_id < last, rows)


def featurize_stored(
    run: "FinishedRun", rows: "TextSource", pooling: str, data_id: str, *, quiet: bool = False
) -> "SparseFeatures":
    """Encode the stored activations and pool them to ``rows``, as ``sae_core.featurize`` would.

    Args:
        rows: from ``stored_rows``.
        pooling: max, mean, sum or last.
        data_id: for the provenance.
    """
    from sae_core.features import SparseFeatures
    from sae_core.featurize import RowTable
    from sae_core.pooling import RowPooler
    from sae_core.shards import ShardedActivations

    sae, origin = run.sae, run.folder.read()["provenance"]
    table = RowTable()
    for _ in table.record(rows):
        pass
    last = max(table.row_id)
    stored = ShardedActivations.open(run.folder.activations / "train", run.hook_point)
    pooler = RowPooler(sae.d_sae, pooling)
    n_batches = -(-stored.n_tokens // BATCH)
    batches = stored.iter_sequential(BATCH)
    for batch in progress(batches, "featurize", n_batches, "batches", enabled=not quiet):
        whole = batch.select((batch.row_id <= last).nonzero()[:, 0])
        codes = sae.encode_sparse(whole.x.to(sae.W_enc.device, sae.W_enc.dtype))
        pooler.update(codes, whole.row_id, whole.position)
    acts, n_tokens = pooler.compute(table.ids())
    provenance = Provenance(
        model_id=origin["model_id"],
        model_revision=origin["model_revision"],
        hook_point=run.hook_point,
        sae_hash=sae.hash(),
        data_id=data_id,
        seed=origin["seed"],
        versions=package_versions("sae-apps", "torch", "transformers"),
    )
    return SparseFeatures(acts, table.table(n_tokens), provenance)
