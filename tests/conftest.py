"""Fixtures and settings of all tests: offline, few threads, the same examples in every run."""

import os
import random
import zlib

# Before torch and transformers are imported, and inherited by every process a test starts. One
# thread: small matrices gain nothing from more, and a busy machine loses much by waiting for them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from sae_core.models import LanguageModel

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if not torch.cuda.is_available():  # before triton is imported, by whomever: its own functions too
    os.environ.setdefault("TRITON_INTERPRET", "1")

# HYPOTHESIS_PROFILE=explore draws new examples, and more of them.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Every test, and the fixtures made for it, draw from a seed of the test's own."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the repository, or $SAE_APPS_SHARED_DATA."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("SAE_APPS_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(
            f"The real test data is not at {folder}; set SAE_APPS_SHARED_DATA to its folder."
        )
    return folder


@pytest.fixture(scope="session")
def stories260k(shared_data: Path) -> Path:
    """A real Llama of 0.29M parameters (5 layers, d=64), as a Hugging Face folder."""
    folder = shared_data / "stories260k"
    if not (folder / "config.json").is_file():
        pytest.skip(f"The small model stories260k is not at {folder}.")
    return folder


@pytest.fixture(scope="session")
def tiny_lm(stories260k: Path) -> "LanguageModel":
    """stories260k, loaded once. Shared by all tests: leave its weights and hooks as they were."""
    from sae_core.models import load_model

    return load_model(str(stories260k))
