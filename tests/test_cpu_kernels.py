"""The suite of the processor's kernels: both sides of each comparison give the same."""

import torch

from benchmarks import cpu_kernels
from sae_core.kernels import active, eager, sparse


def test_both_sides_of_each_comparison_agree(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "N", 300)
    u, rows, bias, codes = cpu_kernels.batch(128)
    assert codes.n == 300 and 10 < len(codes.col) / 300 < 30
    ours = active.active_codes(u, rows.T, bias, dtype=torch.bfloat16)
    theirs = cpu_kernels.dense_search(u, rows, bias)
    assert 10 < len(theirs.col) / 300 < 40
    torch.testing.assert_close(ours.keep(ours.values > 0).to_dense(), theirs.to_dense())
    found = cpu_kernels.mkl(codes.crow, codes.col, codes.values, 128, rows)
    torch.testing.assert_close(found, sparse.matmul(codes, rows))
    torch.testing.assert_close(found, eager.matmul(codes, rows))
    torch.testing.assert_close(cpu_kernels.mkl_transposed(codes, u), sparse.matmul_t(codes, u))


def test_rows_and_goals_of_a_small_run(monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "N", 256)
    rows = cpu_kernels.kernel_rows(128, 1)
    assert rows[0]["what"] == "product bfloat16" and rows[0]["times"] == 1
    assert {"active set", "active set, dense", "A W", "A' G", "step of GBA"} <= {
        row["what"] for row in rows
    }
    slow = [row | {"ms": 5.0} for row in rows]
    missed = {row["what"]: row["passed over"] for row in rows}
    assert 0 < missed["active set"] < 0.2
    if "active set, int8" in missed:
        assert missed["active set, int8"] < missed["active set"]
    met = {goal.name: goal.met for goal in cpu_kernels.goals(slow)}
    assert met["A W over MKL, 128"] and not met["step over the product, 128"]
    slower = [row | {"ms": 9.0 if row["what"] == "A W" else 5.0} for row in rows]
    assert not {goal.name: goal.met for goal in cpu_kernels.goals(slower)}["A W over MKL, 128"]


def test_ours_adds_no_compiler_to_a_process() -> None:
    theirs, ours = (row["MiB"] for row in cpu_kernels.memory_rows())
    assert ours < 5 < theirs
