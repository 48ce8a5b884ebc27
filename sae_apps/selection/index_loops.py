"""Compiled loops of the index: darts of a weighted min-hash, projections, scores of candidates.

Like ``compiled``, this module needs numba (extra ``cpu``), so the modules of the index import it
inside their functions. Rows are given as the three arrays of canonical CSR, checked before; threads
are the caller's.
"""

import numpy as np

from sae_apps.selection.jit import PRODUCT, REORDER, jit
from sae_apps.selection.jit import add_row as _add_row

_STEP = np.uint64(0x9E3779B97F4A7C15)  # the constants of splitmix64 (Steele, Lea, Flood 2014)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
# Bits of a dart's hash: 16 of the bucket, 1 of the code, 23 of the rank, 24 of the weight.
_BUCKET, _BIT, _RANK, _RANK_MASK, _WEIGHT = (
    np.uint64(0xFFFF), np.uint64(16), np.uint64(17), np.uint64(0x7FFFFF), np.uint64(40),
)  # fmt: skip
_ONE, _U16, _U56, _LOW = np.uint64(1), np.uint64(16), np.uint64(56), np.uint64(0xFFFFFFFF)
_OPEN = np.uint32(0x7F800000)  # the bits of an infinite float32: a bucket without a dart
_EVEN, _BIT0, _TOP = np.uint32(0xFFFFFFFE), np.uint32(1), np.uint32(31)
_C1, _C2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # murmur3 (Appleby)
_LOWEST = np.finfo(np.float32).min  # as FAISS's, of a place that was not found
RANKS, GROUPS = 6.0, 8  # from stage to stage: the ranks reach so much further, groups grow so much


@jit(inline="always")
def _mix(z):  # noqa: ANN001, ANN202
    """A bijection of 64 bits that looks random: the finaliser of splitmix64."""
    z = (z ^ (z >> _S30)) * _M1
    z = (z ^ (z >> _S27)) * _M2
    return z ^ (z >> _S31)


@jit()
def stage_darts(  # noqa: ANN201
    seed, latent, stage, weight, width, low, high, group, n_bits, counts, darts  # noqa: ANN001
):  # fmt: skip
    """The darts of one latent below a weight with ranks from low to high; their number.

    Layers of weight [0, w), [w, 2w), [2w, 4w), ... are cut into areas along the rank that hold one
    dart on average; an area's hash gives its number of darts and the place of each. A line of
    ``darts`` [room, 4] is 16 bytes: weight and rank as float32, the first bucket, and a salt. The
    last bit of the rank is the dart's code: one minimum then decides both, without a branch. Darts
    without room are counted only.
    """
    key = _mix(seed ^ (np.uint64(latent) * _STEP) ^ (np.uint64(stage) << _U56))
    n, numbers = 0, darts.view(np.float32)
    floor, level, n_groups = 0.0, np.uint64(0), np.uint64(n_bits // group)
    while floor < weight:
        height = group / width
        base, area = low, _mix(key + level * _M1)
        while base < high:
            z = _mix(area)
            q = 0
            while z > counts[q]:
                q += 1
                h = _mix(z + np.uint64(q) * _STEP)
                w = np.float32(floor + width * (np.float64(h >> _WEIGHT) * 2.0**-24))
                rank = base + height * (np.float64((h >> _RANK) & _RANK_MASK) * 2.0**-23)
                if w < weight and rank < high:
                    if n < len(darts):
                        numbers[n, 0], numbers[n, 1] = w, rank
                        code = np.uint32((h >> _BIT) & _ONE)
                        darts[n, 1] = (darts[n, 1] & _EVEN) | code
                        darts[n, 2] = (((h & _BUCKET) * n_groups) >> _U16) * np.uint64(group)
                        darts[n, 3] = _mix(h) & _LOW
                    n += 1
            area += _STEP
            base += height
        floor += width
        width *= 1.0 if level == 0 else 2.0
        level += _ONE
    return n


@jit()
def dart_table(seed, stage, caps, width, low, high, group, n_bits, counts):  # noqa: ANN001, ANN201
    """All darts of a stage below the caps, and where those of each latent start.

    They rise with the weight, so that a row reads the first few.
    """
    starts = np.zeros(len(caps) + 1, np.int64)
    none = np.empty((0, 4), np.uint32)
    for i in range(len(caps)):
        starts[i + 1] = starts[i] + stage_darts(
            seed, i, stage, caps[i], width, low, high, group, n_bits, counts, none
        )
    darts = np.empty((starts[-1], 4), np.uint32)
    for i in range(len(caps)):
        own = darts[starts[i] : starts[i + 1]]
        stage_darts(seed, i, stage, caps[i], width, low, high, group, n_bits, counts, own)
        order = np.argsort(own.view(np.float32)[:, 0].copy())
        own[:] = own[order]
    return starts, darts


@jit()
def _throw(darts, numbers, first, end, weight, group, best):  # noqa: ANN001, ANN202
    """Let the darts first..end, as far as they lie below the weight, into their buckets."""
    for d in range(first, end):
        if numbers[d, 0] >= weight:
            break
        rank, place = darts[d, 1], darts[d, 2]
        if group == 1:
            best[place] = min(best[place], rank)
            continue
        rank, salt = rank & _EVEN, darts[d, 3]
        for bucket in range(place, place + np.uint32(group)):
            code = np.uint32((salt ^ np.uint32(bucket * _C1)) * _C2) >> _TOP
            best[bucket] = min(best[bucket], rank | np.uint32(code))


@jit()
def _throw_row(index, value, caps, starts, darts, group, best):  # noqa: ANN001, ANN202
    """The darts of one row that a table holds."""
    numbers = darts.view(np.float32)
    for j in range(len(index)):
        latent = np.uint32(index[j])
        if value[j] <= caps[latent]:
            end = starts[latent + np.uint32(1)]
            _throw(darts, numbers, starts[latent], end, value[j], group, best)


@jit()
def dart_codes(  # noqa: ANN201
    indptr, indices, data, start, stop, caps, tables, width, horizon, seed, counts, codes,  # noqa: ANN001
):  # fmt: skip
    """One bit a bucket into ``codes`` [stop - start, n_bits / 8]; module ``sketch`` says how.

    ``width`` is the weight of the lowest layer, ``horizon`` the rank where the first stage ends,
    ``counts`` the distribution function of a Poisson(1) number, as fractions of 2^64, ``tables``
    the darts of the first stages below the weights ``caps``; all others are made when needed.
    """
    n_bits = codes.shape[1] * 8
    best, made = np.empty(n_bits, np.uint32), np.empty((64, 4), np.uint32)
    for row in range(start, stop):
        index = indices[indptr[row] : indptr[row + 1]]
        value = data[indptr[row] : indptr[row + 1]]
        if len(value) == 0 or value.max() <= 0:
            continue
        best[:] = _OPEN
        stage, low, high, group = 0, 0.0, horizon, 1
        while best.max() == _OPEN:
            if stage < len(tables):
                starts, darts = tables[stage]
                _throw_row(index, value, caps, starts, darts, group, best)
            for j in range(len(index)):
                latent, weight = np.uint32(index[j]), value[j]
                if stage < len(tables) and weight <= caps[latent]:
                    continue
                n = stage_darts(
                    seed, latent, stage, weight, width, low, high, group, n_bits, counts, made
                )
                if n > len(made):
                    made = np.empty((n, 4), np.uint32)
                    stage_darts(
                        seed, latent, stage, weight, width, low, high, group, n_bits, counts, made
                    )
                _throw(made, made.view(np.float32), 0, n, weight, group, best)
            low, high, group = high, RANKS * high, min(GROUPS * group, n_bits)
            stage += 1
        for k in range(0, n_bits, 8):
            byte = best[k] & _BIT0
            for b in range(1, 8):
                byte |= (best[k + b] & _BIT0) << np.uint32(b)
            codes[row - start, k >> 3] = byte


LANES = 32  # dimensions of one pass: vector registers hold their sums


@jit()
def project_rows(indptr, indices, values, start, stop, blocks, out):  # noqa: ANN001, ANN201
    """Rows of CSR times dense blocks [n_blocks, d_sae, LANES], divided by the rows' norms.

    ``values`` and ``indices`` (uint32) belong to the nonzeros from ``indptr[start]`` on.
    """
    offset = indptr[start]
    total = np.empty(LANES, np.float32)
    for block in range(len(blocks)):
        place = slice(block * LANES, block * LANES + LANES)
        for row in range(start, stop):
            span = slice(indptr[row] - offset, indptr[row + 1] - offset)
            total[:] = 0
            _add_row(LANES, PRODUCT, total, blocks[block], indices[span], values[span])
            out[row - start, place] = total
    for row in range(start, stop):
        square = np.float32(0)
        for value in values[indptr[row] - offset : indptr[row + 1] - offset]:
            square += value * value
        if square > 0:
            out[row - start] *= np.float32(1) / np.sqrt(square)


@jit(fastmath=REORDER)
def score_candidates(  # noqa: ANN201
    indptr, indices, data, offset, q_indptr, q_indices, q_data,  # noqa: ANN001
    start, stop, rows, places, d_sae, out,  # noqa: ANN001
):  # fmt: skip
    """Exact Jaccard of queries start..stop with those of their candidates that lie in one part.

    ``rows`` [q, c] rises along each line and -1 comes first; ``places`` [q] is where each query
    goes on and is moved. The part holds rows from ``offset`` on; scores go to ``out`` [q, c].
    """
    dense = np.zeros(d_sae, np.float32)
    last = offset + len(indptr) - 1
    for q in range(start, stop):
        span = slice(q_indptr[q], q_indptr[q + 1])
        own = 0.0
        for j in range(q_indptr[q], q_indptr[q + 1]):
            dense[q_indices[j]] = q_data[j]
            own += np.float64(q_data[j])
        c = places[q]
        while c < rows.shape[1] and rows[q, c] < last:
            row = rows[q, c] - offset
            index, value = (
                indices[indptr[row] : indptr[row + 1]],
                data[indptr[row] : indptr[row + 1]],
            )
            shared, norm = 0.0, 0.0
            for j in range(len(index)):
                # unsigned: numba would else allow for negative indices, at twice the time
                a, b = value[j], dense[np.uint32(index[j])]
                shared += np.float64(a if a < b else b)
                norm += np.float64(a)
            below = own + norm - shared
            out[q, c] = shared / below if below > 0 else 0.0
            c += 1
        places[q] = c
        dense[q_indices[span]] = 0


@jit(fastmath=REORDER)
def _product(weights, code):  # noqa: ANN001, ANN202
    total = np.float32(0)
    for j in range(len(weights)):
        total += weights[j] * np.float32(code[j])
    return total


@jit(fastmath=REORDER)
def code_products(codes, weights, constants, places, out):  # noqa: ANN001, ANN201
    """out[q, c] = constants[q] + weights[q] . codes[places[q, c]]; the lowest float32 for place -1.

    ``codes`` uint8 [n, dims], ``weights`` [q, dims]; places are below n. Four rows of codes are
    read at once: one alone waits for memory most of the time.
    """
    for q in range(len(places)):
        weight, row, n = weights[q], places[q], places.shape[1]
        for i in range(0, n - n % 4, 4):
            one, two = codes[max(row[i], 0)], codes[max(row[i + 1], 0)]
            three, four = codes[max(row[i + 2], 0)], codes[max(row[i + 3], 0)]
            a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for j in range(len(weight)):
                w = weight[j]
                a += w * np.float32(one[j])
                b += w * np.float32(two[j])
                c += w * np.float32(three[j])
                d += w * np.float32(four[j])
            out[q, i], out[q, i + 1], out[q, i + 2], out[q, i + 3] = a, b, c, d
        for i in range(n - n % 4, n):
            out[q, i] = _product(weight, codes[max(row[i], 0)])
        for i in range(n):
            out[q, i] = out[q, i] + constants[q] if row[i] >= 0 else _LOWEST
