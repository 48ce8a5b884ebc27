"""Weighted min-hash codes: bits whose agreement estimates the generalised Jaccard without bias.

    P(bit of a = bit of b) = (1 + J(a, b)) / 2,      J = sum_k min(a_k, b_k) / sum_k max(a_k, b_k)

so 1 - 2 h / D estimates J from the Hamming distance h of D bits, which is what the binary indexes
of FAISS search by. Consistent weighted sampling (Manasse, McSherry, Talwar 2010; Ioffe 2010) with
the darts of DartMinHash (Christiani 2020, arXiv 2005.11547): every latent owns a random set of
darts (weight, rank, bucket), a Poisson process that only hashes of (seed, latent, area) decide. A
row sees the darts below its weights, and its sample in a bucket is the seen dart of the lowest
rank: two rows share it exactly if the lowest dart below either's weights is below both's, which has
the chance J. The code keeps one hashed bit of that dart (b-bit min-hash, Li and Koenig 2010).

Deviation: Christiani throws D ln D + 2 D darts so that no bucket stays open. Here the first stage
throws about 2 D; darts of higher rank (second stage, third, ...) each fill a whole group of 8 (64,
...) neighbouring buckets, with a bit of its own for each. A bucket's darts are still a Poisson
process of the same law over weight and rank, so its chance is still J; only the few buckets that
share a dart depend on each other. About 3 D darts are thrown instead of (ln D + 2) D.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, UInt8
from scipy import sparse

from sae_apps.selection import kernels
from sae_core.errors import UserError
from sae_core.extras import require
from sae_core.features import shape_of

_DARTS = 2.0  # a bucket, in the first stage, of a row of the stated norm
_LAYER = 2.0  # darts of the lowest layer of weight, one latent, in the first stage
_TASK_ROWS = 256
_MOST_NORMS = 1000.0
_TABLES = 3  # stages; hardly a row needs another
_TABLE_DARTS = 1 << 25  # of the first stage, 16 bytes each
_POISSON = np.array(  # distribution function of a Poisson number of mean 1, as fractions of 2^64
    [
        min(int(sum(math.exp(-1) / math.factorial(n) for n in range(top + 1)) * 2.0**64), 2**64 - 1)
        for top in range(20)
    ]
    + [2**64 - 1],
    dtype=np.uint64,
)


@dataclass(frozen=True)
class WeightedMinHash:
    """Settings of the codes; codes of equal settings can be compared, and of no others."""

    d_sae: int
    """Number of latents."""
    n_bits: int = 2048
    """D, bits of a code: a multiple of 8, at most 65,536."""
    seed: int = 0
    """Of the hashes."""
    norm: float = 1.0
    """Typical |a|_1 of the rows. It decides speed, not the expectation: larger rows cost more
    darts, in smaller ones more buckets share a dart, which widens the error."""

    def __post_init__(self) -> None:
        if not 8 <= self.n_bits <= 65_536 or self.n_bits % 8:
            raise UserError(
                f"Expected n_bits as a multiple of 8 between 8 and 65536, got {self.n_bits}."
            )
        if not (math.isfinite(self.norm) and self.norm > 0):
            raise UserError(f"Expected a finite norm above 0, got {self.norm}.")

    def codes(self, acts: sparse.csr_array) -> UInt8[np.ndarray, "n n_bytes"]:
        """The code of every row, n_bits / 8 bytes; a row without a positive entry has all zeros.

        A row's code depends on nothing but the row and the settings.

        Raises:
            UserError: another width, or not canonical non-negative CSR in float32.
            MissingExtraError: numba is not installed.
        """
        check_rows(acts, self.d_sae)
        require("numba", "cpu")
        from sae_apps.selection.index_loops import dart_codes

        self._check_norms(acts)
        out = np.zeros((shape_of(acts)[0], self.n_bits // 8), dtype=np.uint8)
        caps, tables = self._tables(acts)

        def work(rows: tuple[int, int]) -> None:
            dart_codes(
                acts.indptr, acts.indices, acts.data, *rows, caps, tables,
                self._width, self._horizon, self._key, _POISSON, out[rows[0] : rows[1]],
            )  # fmt: skip

        n = len(out)
        tasks = [(start, min(start + _TASK_ROWS, n)) for start in range(0, n, _TASK_ROWS)]
        for _ in kernels.in_threads(work, tasks):
            pass
        return out

    @property
    def _horizon(self) -> float:
        """Rank where the first stage ends."""
        return _DARTS * self.n_bits / self.norm

    @property
    def _width(self) -> float:
        """Weight of the lowest layer."""
        return _LAYER / self._horizon

    @property
    def _key(self) -> np.uint64:
        return np.uint64((self.seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)

    @cached_property
    def _cache(self) -> list[tuple]:
        return []

    def _tables(self, acts: sparse.csr_array) -> tuple:
        """Darts below the largest weights of the first rows seen, for the first stages.

        They are what a row would make itself, only ready: which rows came first changes the speed.
        """
        from sae_apps.selection.index_loops import GROUPS, RANKS, dart_table

        if not self._cache:
            caps = np.zeros(self.d_sae, dtype=np.float32)
            np.maximum.at(caps, acts.indices, acts.data)
            room = _TABLE_DARTS / max(1.0, float(caps.sum()) * self._horizon)
            caps *= np.float32(min(1.0, room))
            bounds = (0.0, *(self._horizon * RANKS**stage for stage in range(_TABLES)))
            tables = tuple(
                dart_table(
                    self._key, stage, caps, self._width, bounds[stage], bounds[stage + 1],
                    GROUPS**stage, self.n_bits, _POISSON,
                )
                for stage in range(_TABLES)
            )  # fmt: skip
            self._cache.append((caps, tables))
        return self._cache[0]

    def _check_norms(self, acts: sparse.csr_array) -> None:
        """Time grows with a row's norm, so that one of 10^9 would seem to hang."""
        norms = np.asarray(acts.sum(axis=1, dtype=np.float64)).ravel()
        most = norms.max(initial=0.0)
        if most > _MOST_NORMS * self.norm:
            raise UserError(
                f"Expected rows of |a|_1 up to {_MOST_NORMS:g} times the norm {self.norm:g}, got "
                f"{most:g} in line {norms.argmax()}."
            )

    def estimate(
        self, left: UInt8[np.ndarray, "n n_bytes"], right: UInt8[np.ndarray, "m n_bytes"]
    ) -> Float[np.ndarray, "n m"]:
        """1 - 2 h / D of every pair of codes: J without bias, so below 0 for some unlike pairs."""
        distance = np.bitwise_count(left[:, None] ^ right[None]).sum(axis=2, dtype=np.int64)
        return 1 - 2 * distance / self.n_bits

    def standard_error(self, jaccard: float) -> float:
        """sqrt((1 - J^2) / D): of the estimate, for rows of the stated norm or more."""
        return math.sqrt(max(0.0, 1 - jaccard**2) / self.n_bits)


def check_rows(acts: sparse.csr_array, d_sae: int) -> None:
    """Refuse rows of another width, or such as a compiled loop must not read.

    Raises:
        UserError: names both widths, or the line and the value.
    """
    kernels.check_pointers(acts)
    if shape_of(acts)[1] != d_sae:
        raise UserError(f"Expected rows of d_sae {d_sae}, got {shape_of(acts)[1]}.")
    if message := kernels.complaint(acts):
        raise UserError(message)
