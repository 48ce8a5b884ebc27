"""Codes of sparse rows inside a FAISS index: encode rows, add them, find candidates.

A method turns rows into vectors (``projection``) or bits (``sketch``); a FAISS factory string says
how those are stored and searched. One class holds both, so that everything above deals in rows
and places alone.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float32, Int64
from safetensors.numpy import load_file, save_file
from scipy import sparse

from sae_apps.selection.projection import METHODS as PROJECTIONS
from sae_apps.selection.projection import POWER, Method, Projection, fit_projection
from sae_apps.selection.refine import fine_codes, refined
from sae_apps.selection.sketch import WeightedMinHash
from sae_core.errors import CorruptFileError, UserError
from sae_core.extras import require
from sae_core.features import shape_of

METHODS = (*PROJECTIONS, "minhash")
FINE = "PQ112x4fs,Refine(SQ8)"  # 56 bytes scanned, 448 to refine the best of the scan
_FINE_DIMS, _FINE_ROWS = 448, 1024  # of the sample; below, codes of 4 bits cannot be trained
_SEARCH_BLOCK = 4096


@dataclass(frozen=True)
class IndexConfig:
    """How an index encodes and searches."""

    method: str = "kernel"
    """kernel, svd, random (inner products, see ``projection``) or minhash (bits, ``sketch``)."""
    dims: int | None = None
    """Dimensions, or bits of minhash. None: 448 or as many as the sample allows; 4,096 bits."""
    factory: str | None = None
    """FAISS factory string, e.g. ``Flat``, ``IVF1024,SQ8``, ``HNSW32``; for minhash ``BFlat``,
    ``BIVF1024``, ``BHNSW32``. None: PQ112x4fs,Refine(SQ8), 504 bytes a row, or Flat where the
    sample is too small for it; BFlat."""
    oversample: int = 3
    """With Refine: the scan hands over so many times the candidates."""
    effort: int | None = None
    """Cells visited with IVF, efSearch with HNSW; None: an eighth of the cells, and 256."""
    fit_rows: int = 2048
    """Rows of the random sample that the projection and the quantisers are fitted on."""
    power: float = POWER
    """p of ``projection``."""
    seed: int = 0
    """Of the sample, the projection and the hashes."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"Expected a method of {METHODS}, got {self.method!r}.")
        for name in ("oversample", "fit_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        for name in ("dims", "effort"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"Expected {name} of at least 1 or None, got {value}.")
        if self.power <= 0:
            raise UserError(f"Expected a power above 0, got {self.power}.")


class Codes:
    """A fitted encoder with its FAISS index; grows by ``add``."""

    def __init__(self, encoder: Projection | WeightedMinHash, index: Any) -> None:
        self.encoder = encoder
        self.index = index

    @classmethod
    def fit(cls, sample: sparse.csr_array, config: IndexConfig) -> "Codes":
        """Fit encoder and quantisers on sample rows; nothing is stored yet.

        Raises:
            UserError: the sample is too small for the settings, or FAISS refuses the factory.
        """
        faiss = require("faiss", "cpu")
        encoder = _fit_encoder(sample, config)
        factory = config.factory or _factory(encoder, shape_of(sample)[0])
        try:
            if isinstance(encoder, WeightedMinHash):
                index = faiss.index_binary_factory(encoder.n_bits, factory)
                vectors = encoder.codes(sample)
            else:
                index = faiss.index_factory(encoder.dims, factory, faiss.METRIC_INNER_PRODUCT)
                vectors = encoder.embed(sample)
            _reseed(faiss, index, config.seed)
            if not index.is_trained:
                index.train(vectors)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(
                f"Expected a factory that FAISS can train on {shape_of(sample)[0]} rows, "
                f"got {factory!r}: {reason}"
            ) from error
        return cls(encoder, index)

    def emptied(self) -> "Codes":
        """The same encoder and quantisers without rows."""
        index = require("faiss", "cpu").clone_index(self.index)
        index.reset()
        return Codes(self.encoder, index)

    @property
    def n_rows(self) -> int:
        return int(self.index.ntotal)

    @property
    def bytes_per_row(self) -> float:
        """Size of the FAISS index, divided by its rows: codes, ids, links, tables."""
        faiss = require("faiss", "cpu")
        binary = isinstance(self.encoder, WeightedMinHash)
        write = faiss.serialize_index_binary if binary else faiss.serialize_index
        return len(write(self.index)) / max(1, self.n_rows)

    def encode(self, acts: sparse.csr_array) -> np.ndarray:
        """Vectors [n, dims], or codes [n, n_bits / 8]."""
        if isinstance(self.encoder, WeightedMinHash):
            return self.encoder.codes(acts)
        return self.encoder.embed(acts)

    def add(self, acts: sparse.csr_array) -> None:
        """Encode rows and store their codes, in order."""
        if shape_of(acts)[0]:
            self.index.add(self.encode(acts))

    def candidates(
        self, queries: sparse.csr_array, n: int, config: IndexConfig
    ) -> tuple[Int64[np.ndarray, "q n"], Float32[np.ndarray, "q n"]]:
        """Places of the n rows that look nearest, and how near they look, best first.

        Inner products, or minus Hamming distances; place -1 where FAISS found fewer.
        """
        faiss = require("faiss", "cpu")
        _set_effort(faiss, self.index, config)
        fine = fine_codes(faiss, self.index)
        found = np.empty((shape_of(queries)[0], n), dtype=np.int64)
        near = np.empty(found.shape, dtype=np.float32)
        sign = -1 if isinstance(self.encoder, WeightedMinHash) else 1
        for start in range(0, len(found), _SEARCH_BLOCK):
            part = slice(start, start + _SEARCH_BLOCK)
            vectors = self.encode(queries[part])
            if fine is None:
                values, found[part] = self.index.search(vectors, n)
            else:
                values, found[part] = refined(*fine, vectors, n, config.oversample)
            near[part] = sign * values
        if found.size and found.max() >= self.n_rows:  # compiled loops trust them
            raise CorruptFileError(
                f"Expected places below {self.n_rows} from the FAISS index, got {found.max()}."
            )
        return found, near

    def save(self, folder: Path) -> None:
        """Files ``codes.faiss`` and ``encoder.safetensors`` into a folder."""
        faiss = require("faiss", "cpu")
        if isinstance(self.encoder, WeightedMinHash):
            faiss.write_index_binary(self.index, str(folder / "codes.faiss"))
            kept = {"norm": np.array([self.encoder.norm])}
        else:
            faiss.write_index(self.index, str(folder / "codes.faiss"))
            kept = {"matrix": self.encoder.matrix}
        save_file(kept, folder / "encoder.safetensors")

    @classmethod
    def load(cls, folder: Path, config: IndexConfig, d_sae: int) -> "Codes":
        """What ``save`` wrote."""
        faiss = require("faiss", "cpu")
        kept = load_file(folder / "encoder.safetensors")
        if config.method == "minhash":
            index = _read_index(faiss, folder / "codes.faiss", faiss.read_index_binary)
            return cls(WeightedMinHash(d_sae, index.d, config.seed, float(kept["norm"][0])), index)
        index, matrix = _read_index(faiss, folder / "codes.faiss", faiss.read_index), kept["matrix"]
        if matrix.shape != (d_sae, index.d) or matrix.dtype != np.float32:
            raise ValueError(f"a {matrix.dtype} projection of {matrix.shape} for {d_sae, index.d}")
        return cls(Projection(matrix, config.power), index)


def _read_index(faiss: Any, file: Path, read: Any) -> Any:
    """The index in a file; no array of it may claim more bytes than the file has."""
    name = "deserialization_vector_byte_limit"
    if not hasattr(faiss, f"set_{name}"):  # before FAISS 1.14
        return read(str(file))
    before = getattr(faiss, f"get_{name}")()
    getattr(faiss, f"set_{name}")(file.stat().st_size)
    try:
        return read(str(file))
    finally:
        getattr(faiss, f"set_{name}")(before)


def _fit_encoder(sample: sparse.csr_array, config: IndexConfig) -> Projection | WeightedMinHash:
    n, d_sae = shape_of(sample)
    full = np.flatnonzero(np.diff(sample.indptr) > 0)
    if config.method == "minhash":
        norms = np.add.reduceat(sample.data, sample.indptr[full]) if len(full) else np.ones(1)
        return WeightedMinHash(d_sae, config.dims or 4096, config.seed, float(np.median(norms)))
    dims = config.dims or min(_FINE_DIMS, len(full), d_sae)
    if not len(full):
        raise UserError(f"Expected sample rows with active latents, got {n} empty ones.")
    return fit_projection(
        sample,
        dims,
        cast("Method", config.method),
        power=config.power,
        generator=np.random.default_rng(config.seed),
    )


def _factory(encoder: Projection | WeightedMinHash, n_sample: int) -> str:
    if isinstance(encoder, WeightedMinHash):
        return "BFlat"
    return FINE if encoder.dims == _FINE_DIMS and n_sample >= _FINE_ROWS else "Flat"


def _reseed(faiss: Any, index: Any, seed: int) -> None:
    """The k-means of the product quantiser and of the cells draw from the seed."""
    index = faiss.downcast_index(index) if isinstance(index, faiss.Index) else index
    while hasattr(index, "base_index"):
        index = faiss.downcast_index(index.base_index)
    for part in (index, getattr(index, "pq", None)):
        training = getattr(part, "cp", None)
        if training is not None:
            training.seed = seed + 1234  # FAISS's own default for 0


def _set_effort(faiss: Any, index: Any, config: IndexConfig) -> None:
    """Parameters of the search, on whichever layer of the index has them."""
    if not isinstance(index, faiss.Index):
        index = faiss.downcast_IndexBinary(index)
    else:
        index = faiss.downcast_index(index)
    while hasattr(index, "base_index"):
        index.k_factor = float(config.oversample)
        index = faiss.downcast_index(index.base_index)
    if hasattr(index, "nprobe"):
        index.nprobe = min(index.nlist, config.effort or max(1, index.nlist // 8))
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = config.effort or 256
