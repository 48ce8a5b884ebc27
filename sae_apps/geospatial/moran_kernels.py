"""Compiled loops of Moran's I: the quadratic form of many features under shared permutations.

For a permutation that moves the value of place i to perm[i],

    (P x)' W (P x) = sum over i, x_i != 0, of x_i sum_j W[perm[i], perm[j]] x_j,

so the weights are relabelled once for all features, and a feature, spread once into a dense
workspace, costs its nonzeros times the neighbours of a place. This module needs numba (extra
``cpu``). Threads are the caller's: every loop releases the GIL. Sums are float64, in a fixed order.
"""

from sae_core.kernels.compiled import compiler

jit = compiler("geospatial")


@jit()
def relabel_table(table, perm, back, out):  # noqa: ANN001, ANN201
    """out[i, j] = the place whose value comes to lie at neighbour j of perm[i].

    Entries that fill a row up are n, and so is ``back[n]``.
    """
    for i in range(len(perm)):
        here = perm[i]
        for j in range(table.shape[1]):
            out[i, j] = back[table[here, j]]


@jit()
def relabel_csr(indptr, indices, data, perm, back, out_indptr, out_indices, out_data):  # noqa: ANN001, ANN201
    """The same for rows of any length and any weights; ``out_*`` are a CSR matrix."""
    out_indptr[0] = 0
    for i in range(len(perm)):
        here, at = perm[i], out_indptr[i]
        for t in range(indptr[here], indptr[here + 1]):
            out_indices[at] = back[indices[t]]
            out_data[at] = data[t]
            at += 1
        out_indptr[i + 1] = at


@jit()
def quadratic_table(  # noqa: ANN201
    indptr, indices, data, live, means, loads, tables, factors, work, out,  # noqa: ANN001
):  # fmt: skip
    """out[f, b] = sum_i x_i (factors[b, i] sum_j x[tables[b, i, j]] - means[f] loads[b, i]).

    f runs over the features ``live``, which are columns of a CSC matrix. ``work`` has n + 1 zeros
    and is zero again afterwards.
    """
    n_tables, k = tables.shape[0], tables.shape[2]
    for f in range(len(live)):
        first, end = indptr[live[f]], indptr[live[f] + 1]
        for t in range(first, end):
            work[indices[t]] = data[t]
        for b in range(n_tables):
            table, factor, load = tables[b], factors[b], loads[b]
            mean, total = means[live[f]], 0.0
            for t in range(first, end):
                i = indices[t]
                lag = 0.0
                for j in range(k):
                    lag += work[table[i, j]]
                total += data[t] * (factor[i] * lag - mean * load[i])
            out[f, b] = total
        for t in range(first, end):
            work[indices[t]] = 0


@jit()
def quadratic_csr(  # noqa: ANN201
    indptr, indices, data, live, means, loads, rows, columns, weights, work, out,  # noqa: ANN001
):  # fmt: skip
    """The same for CSR weights: ``rows`` [B, n + 1], ``columns`` and ``weights`` [B, links]."""
    for f in range(len(live)):
        first, end = indptr[live[f]], indptr[live[f] + 1]
        for t in range(first, end):
            work[indices[t]] = data[t]
        for b in range(rows.shape[0]):
            row, column, weight, load = rows[b], columns[b], weights[b], loads[b]
            mean, total = means[live[f]], 0.0
            for t in range(first, end):
                i = indices[t]
                lag = 0.0
                for j in range(row[i], row[i + 1]):
                    lag += weight[j] * work[column[j]]
                total += data[t] * (lag - mean * load[i])
            out[f, b] = total
        for t in range(first, end):
            work[indices[t]] = 0


@jit()
def linear_table(indptr, indices, data, live, table, out):  # noqa: ANN001, ANN201
    """out[f, c] = sum_i x_i table[i, c]; ``table`` [n, c] is contiguous, ``out`` [live, c]."""
    width = table.shape[1]
    for f in range(len(live)):
        total = out[f]
        total[:] = 0.0
        for t in range(indptr[live[f]], indptr[live[f] + 1]):
            value, row = data[t], table[indices[t]]
            for c in range(width):
                total[c] += value * row[c]


@jit()
def linear_groups(  # noqa: ANN201
    indptr, indices, data, live, mean_ptr, mean_group, mean,  # noqa: ANN001
    load_ptr, load_place, load, perms, work, out,  # noqa: ANN001
):  # fmt: skip
    """out[f, b] = sum_i x_i g[perms[b, i]] with g = sum over groups s of mean[f, s] load[:, s].

    ``mean`` is CSR over features, ``load`` CSC over groups; ``work`` has n entries.
    """
    for f in range(len(live)):
        first, end = indptr[live[f]], indptr[live[f] + 1]
        work[:] = 0.0
        for s in range(mean_ptr[live[f]], mean_ptr[live[f] + 1]):
            group, value = mean_group[s], mean[s]
            for t in range(load_ptr[group], load_ptr[group + 1]):
                work[load_place[t]] += value * load[t]
        for b in range(perms.shape[0]):
            perm = perms[b]
            total = 0.0
            for t in range(first, end):
                total += data[t] * work[perm[indices[t]]]
            out[f, b] = total


@jit()
def quadratic_dense(indptr, indices, data, values, back, work, lag, out):  # noqa: ANN001, ANN201
    """out[c] = sum_i y_ic sum_j H_ij y_jc with y = values[back], a block of columns.

    H is CSR. Rows are copied into their permuted places first, so that the neighbours of a place,
    which are near in memory where the places are well ordered, are read from the cache.
    """
    n, width = values.shape
    for i in range(n):
        for c in range(width):
            work[i, c] = values[back[i], c]
    out[:] = 0.0
    for i in range(n):
        lag[:] = 0.0
        for t in range(indptr[i], indptr[i + 1]):
            weight = data[t]
            row = work[indices[t]]
            for c in range(width):
                lag[c] += weight * row[c]
        for c in range(width):
            out[c] += work[i, c] * lag[c]
