"""Features made shard by shard on disk: a kill loses at most the shards at work.

    OUT.partial/plan.json       what decides the features, written first
    OUT.partial/shard-00000/    codes of rows 0 to shard_rows - 1, and so on
    OUT/                        the shards joined, with texts and labels; OUT.partial goes then

A shard is a fixed range of rows that is encoded on its own: whoever makes it, in whatever order and
after whatever kills, makes the same one, since the batches of its forward passes are its own.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from scipy import sparse

from sae_core.disk import atomic_write_text, only_writer, owner_tag, remove_stale
from sae_core.encoder import SparseEncoder
from sae_core.errors import CorruptFileError, UserError
from sae_core.features import SparseFeatures
from sae_core.featurize import (
    EncodedRows,
    RowTable,
    check_whole_rows,
    encode_rows,
    features_of,
    origin,
)
from sae_core.provenance import Provenance
from sae_core.sealed import sealed, unsealed
from sae_core.store import atomic_folder, recover_folder, save_features, verify_folder
from sae_core.text import TextRow, windows
from sae_core.tokens import HarvestConfig
from sae_core.untrusted import read_object, reading

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

SHARD_ROWS = 1024
PLAN = "plan.json"
_CODES, _ORIGIN = "codes.safetensors", "provenance.json"
_MATRIX = ("data", "indices", "indptr")


@dataclass(frozen=True)
class FeaturePlan:
    """What decides the features of a text, beside the text, the model and the SAE."""

    hook_point: str
    """Where the SAE was trained, e.g. ``layers.15.out``."""
    data_id: str
    """Where the texts come from, for the provenance."""
    pooling: str = "max"
    """See ``featurize``."""
    config: HarvestConfig = field(default_factory=HarvestConfig)
    """See ``featurize``. Batches are cut anew in each shard."""
    seed: int = 0
    """Seed of the run that made the SAE, for the provenance."""
    shard_rows: int = SHARD_ROWS
    """Rows of a shard. Another number changes activations by rounding."""

    def __post_init__(self) -> None:
        check_whole_rows(self.pooling, self.config)
        if self.shard_rows < 1:
            raise UserError(f"Expected shard_rows of at least 1, got {self.shard_rows}.")

    def identity(self, model: str, dtype: str, device: str, sae_hash: str) -> dict[str, Any]:
        """Everything that decides the shards of one folder, as one flat mapping."""
        own = asdict(self)
        config = own.pop("config")
        facts = {"model": model, "dtype": dtype, "device": device.partition(":")[0]}
        return facts | {"sae_hash": sae_hash} | own | config


@dataclass(frozen=True, eq=False)
class Featurizer:
    """A model and an SAE that make the shards of a plan."""

    lm: "LanguageModel"
    sae: SparseEncoder
    plan: FeaturePlan
    origin: Provenance

    @staticmethod
    def of(lm: "LanguageModel", sae: SparseEncoder, plan: FeaturePlan) -> "Featurizer":
        """With the origin of the features, for which the SAE is hashed once."""
        source = origin(lm, sae, plan.hook_point, plan.data_id, plan.seed)
        return Featurizer(lm, sae, plan, source)

    def write(
        self,
        folder: Path,
        rows: Iterable[TextRow],
        number: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Encode the rows of one shard into its folder, unless it is there.

        Args:
            rows: ``shard_rows`` rows from row ``number * shard_rows`` of the text on.
            progress: called with numbers of tokens as they are done, kept ones included.
        Raises:
            UserError: see ``featurize``; a shard that is there and of another origin, such as
                another version of torch. CorruptFileError: a shard that is there is damaged.
        """
        place = _place(folder, number)
        recover_folder(place)
        if place.is_dir():
            found, made_by = _read_shard(place)
            _check_origin(place, made_by, self.origin)
            if progress is not None:
                progress(_n_tokens(found))
            return
        plan = self.plan
        found = encode_rows(
            self.lm, self.sae, rows, plan.hook_point, plan.pooling, plan.config, progress
        )
        with atomic_folder(place) as temp:
            matrix = {name: getattr(found.acts, name) for name in _MATRIX}
            shape = np.array(found.acts.shape, dtype=np.int64)
            tensors = {"shape": shape, **matrix, **found.columns}
            safetensors.numpy.save_file(tensors, temp / _CODES)
            (temp / _ORIGIN).write_text(json.dumps(self.origin.to_dict(), indent=1), "utf-8")


def featurize_to(
    out: str | os.PathLike[str],
    lm: "LanguageModel",
    sae: SparseEncoder,
    rows: Iterable[TextRow],
    plan: FeaturePlan,
    *,
    progress: Callable[[int], None] | None = None,
) -> SparseFeatures:
    """As ``featurize``, shard by shard into a folder of features; a killed call is repeated.

    What was interrupted, how often ever, ends with the bytes of an unbroken call. Equal to
    ``featurize`` on rows of one shard; on more, activations differ from its by rounding.

    Args:
        out: new or empty; until the features are whole, the shards are in ``OUT.partial``.
        rows: the texts, the same and in the same order in a repeated call.
        progress: called with numbers of tokens as they are done, kept ones included.
    Raises:
        UserError: see ``featurize``; ``OUT.partial`` holds shards of another plan (names the first
            difference). CorruptFileError: a finished shard is damaged.
    """
    maker, table = Featurizer.of(lm, sae, plan), RowTable()
    dtype = str(lm.model.dtype).removeprefix("torch.")
    identity = plan.identity(lm.model_id, dtype, str(lm.device), maker.origin.sae_hash)
    with unfinished(out, identity) as folder:
        for number, part in enumerate(windows(table.record(rows), plan.shard_rows)):
            maker.write(folder, part, number, progress)
        return join_shards(folder, table, plan, out)


@contextmanager
def unfinished(out: str | os.PathLike[str], identity: dict[str, Any]) -> Iterator[Path]:
    """The folder of the shards beside ``out``; removed when the block ends well.

    When it ends with an error, the folder stays if a finished shard is in it.

    Raises:
        UserError: ``out`` is taken; the folder holds other files, shards of another identity, or
            another process is at work in it.
    """
    folder = partial_folder(out)
    _refuse_taken(Path(out), folder)
    with only_writer(folder):
        remove_stale(folder)
        _claim(folder, identity)
        try:
            yield folder
        except BaseException:
            if not any(folder.glob("shard-*")):
                _discard(folder)
            raise
        _discard(folder)


def partial_folder(out: str | os.PathLike[str]) -> Path:
    """Where the shards of features are until these are whole."""
    out = Path(out).resolve()
    return out.with_name(f"{out.name}.partial")


def forget_shards(out: str | os.PathLike[str]) -> None:
    """Remove the shards of features that are whole: a kill may have come in between."""
    folder = partial_folder(out)
    remove_stale(folder)
    if (folder / PLAN).is_file():
        with only_writer(folder):
            _discard(folder)


def _discard(folder: Path) -> None:
    """Under a name for rubbish first: a half-deleted folder would be taken for someone else's."""
    rubbish = folder.with_name(f".{folder.name}.{owner_tag('tmp')}")
    os.replace(folder, rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def join_shards(
    folder: Path, table: RowTable, plan: FeaturePlan, out: str | os.PathLike[str]
) -> SparseFeatures:
    """Save the features of all shards in ``out``, with the table of the rows.

    Raises:
        UserError: no row, no token, or a shard of another origin than the first.
        CorruptFileError: a shard is missing, damaged, or not of these rows.
    """
    places = [_place(folder, number) for number in range(-(-len(table.row_id) // plan.shard_rows))]
    if not places:
        raise UserError("Expected at least one row of text, got none.")
    parts, made_by = zip(*(_read_shard(place) for place in places), strict=True)
    for place, one in zip(places, made_by, strict=True):
        _check_origin(place, one, made_by[0])
    columns = {
        name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns
    }
    if len(columns.get("n_tokens", table.row_id)) != len(table.row_id):
        raise CorruptFileError(
            f"{folder}: expected codes of {len(table.row_id)} rows, got {len(columns['n_tokens'])}."
        )
    acts = sparse.csr_array(sparse.vstack([part.acts for part in parts], format="csr"))
    features = features_of(EncodedRows(acts, columns), table, made_by[0])
    save_features(out, features)
    return features


def _refuse_taken(out: Path, folder: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"Expected a new or empty folder for the features, got {out}.")
    if folder.is_file():
        raise UserError(f"Expected room for a folder at {folder}, got a file.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PLAN).is_file():
        ours = f".{PLAN}"  # the left-over of a kill at the very beginning
        if any(not path.name.startswith(ours) for path in folder.iterdir()):
            raise UserError(
                f"Expected a new folder or one of unfinished features at {folder}, got one with "
                "other files."
            )


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Write ``plan.json``, or check that the shards that are there are of this identity."""
    place = folder / PLAN
    if place.is_file() and any(folder.glob("shard-*")):
        held = unsealed(read_object(place), place)
        for name in dict.fromkeys([*identity, *held]):
            if held.get(name) != identity.get(name):
                raise UserError(
                    f"{folder} holds unfinished features with {name} = {held.get(name)!r}, this "
                    f"call has {name} = {identity.get(name)!r}: choose another folder, finish "
                    "those, or remove them."
                )
        return
    atomic_write_text(place, json.dumps(sealed(identity), indent=1) + "\n")


def _place(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


def _read_shard(place: Path) -> tuple[EncodedRows, Provenance]:
    if not place.is_dir():
        raise CorruptFileError(f"{place} is missing: expected a finished shard.")
    verify_folder(place)
    with reading("a shard of features", place):
        tensors = safetensors.numpy.load_file(place / _CODES)
        n_rows, d_sae = (int(n) for n in tensors.pop("shape"))
        matrix = tuple(tensors.pop(name) for name in _MATRIX)
        acts = sparse.csr_array(matrix, shape=(n_rows, d_sae))
        return EncodedRows(acts, tensors), Provenance(**read_object(place / _ORIGIN))


def _n_tokens(found: EncodedRows) -> int:
    counts = found.columns.get("n_tokens")
    return len(found.columns["position"]) if counts is None else int(counts.sum())


def _check_origin(place: Path, found: Provenance, wanted: Provenance) -> None:
    for name, value in wanted.to_dict().items():
        if (held := getattr(found, name)) != value:
            raise UserError(
                f"{place} holds a shard with {name} {held!r}, expected {value!r} as in the others: "
                f"remove {place.parent} to begin anew."
            )
