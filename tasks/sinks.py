"""Metrics also sent to Weights & Biases or TensorBoard, when asked for."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from sae_core.errors import MissingExtraError

Send = Callable[[Mapping[str, Any]], None]
PACKAGES = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}


def check_sink(kind: str) -> None:
    """Raises:
    MissingExtraError: the package that ``--log kind`` needs is not installed; names it.
    """
    if kind == "none":
        return
    try:
        import_module(PACKAGES[kind])
    except ImportError as error:
        raise MissingExtraError(
            f"--log {kind} needs the package {kind}, which is not installed: pip install {kind}."
        ) from error


@contextmanager
def open_sink(kind: str, folder: Path) -> Iterator[Send]:
    """Yield a function that takes one record of metrics; for ``none`` it does nothing.

    Args:
        kind: none, wandb or tensorboard.
        folder: the run's; both write below it.
    """
    check_sink(kind)
    if kind == "wandb":
        import wandb

        with wandb.init(dir=str(folder), name=folder.name) as session:
            yield lambda record: session.log(dict(record), step=record["step"])
    elif kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / "tensorboard")) as writer:

            def send(record: Mapping[str, Any]) -> None:
                for name, value in record.items():
                    writer.add_scalar(name, value, record["step"])

            yield send
    else:
        yield lambda record: None
