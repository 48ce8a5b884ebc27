"""Folders of other SAE libraries for the tests: stored examples, and small ones made here.

golden/interop.json holds SAEs that the libraries themselves made and saved, and what they compute:
`python -m benchmarks.interop --python LIBRARY=PYTHON ... --golden tests/golden/interop.json`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = json.loads((Path(__file__).parent / "golden" / "interop.json").read_text())["cases"]
NAMES = [f"{case['library']}: {case['case']}" for case in GOLDEN]
Tensors = dict[str, torch.Tensor]


def golden(name: str) -> dict[str, Any]:
    """The stored example of this name."""
    return GOLDEN[NAMES.index(name)]


def tensors_of(case: dict[str, Any]) -> Tensors:
    """The weights of a stored example in their dtypes."""
    return {
        name: torch.tensor(value, dtype=getattr(torch, dtype))
        for name, (dtype, value) in case["tensors"].items()
    }


def lay(folder: Path, case: dict[str, Any], tensors: Tensors | None = None, **config: Any) -> Path:
    """Write an example to a folder, with other tensors or configuration where they are given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = tensors_of(case) if tensors is None else tensors
    if case["weights_file"].endswith(".pt"):
        torch.save(tensors, folder / case["weights_file"])
        changed = {"trainer": case["config"]["trainer"] | config}
    else:
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / case["weights_file"])
        changed = case["config"] | config
    (folder / case["config_file"]).write_text(json.dumps(changed))
    return folder


def expected(case: dict[str, Any]) -> Tensors:
    """x, codes and x_hat of a stored example."""
    return {name: torch.tensor(value) for name, value in case["expected"].items()}
