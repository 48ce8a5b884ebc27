"""The table of docs/formats.md: each library and case with its largest differences.

    python -m benchmarks.interop_table      print it
"""

import json
from typing import Any

from benchmarks.common import RESULTS, cell, table


def interop(result: dict[str, Any]) -> str:
    """Largest differences, relative to the largest code and the largest entry of x_hat."""
    return table([
        {
            "library": f"{row['library']} {row['version']}",
            "way": row["direction"], "SAE": row["case"], "kind here": row["kind"],
            "L0": cell(row.get("L0")), "codes": cell(row.get("codes_rel")),
            "reconstruction": cell(row["x_hat_rel"]), "on one side": cell(row.get("flips")),
        }
        for row in result["rows"]
    ])  # fmt: skip


if __name__ == "__main__":
    print(interop(json.loads((RESULTS / "interop.json").read_text())))
