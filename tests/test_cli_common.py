"""The shared plumbing of the commands: parsing, condensed errors, counts, progress, signals."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from sae_apps.tasks.common import (
    Interrupted,
    StopSignal,
    catch_signals,
    first_difference,
    nearest,
    one_line,
    plain,
    run_command,
    run_guarded,
    size,
    to_json,
    token_count,
)
from sae_apps.tasks.parsing import CommandParser, take
from sae_apps.tasks.progress import Progress, duration, progress
from sae_core.errors import UserError


@dataclass(frozen=True)
class Sae:
    """Settings of the SAE."""

    d_in: int
    """Width of the activations."""
    kind: Literal["gba", "topk"] = "gba"
    """Family."""
    d_sae: int | None = None
    """Number of latents."""
    lr: float = 1e-3
    """Learning rate."""
    tied: bool = True
    """Whether the decoder is the encoder's transpose."""


@dataclass(frozen=True)
class Model:
    """Settings of the model."""

    name: str = "smollm2-135m"
    """Hub id, folder or file."""


@dataclass(frozen=True)
class Run:
    """Settings of the run."""

    tokens: int | str = "1M"
    """Training tokens."""


def parser() -> CommandParser:
    made = CommandParser(
        "train",
        "Train.",
        "sae-apps train --d-sae 8",
        short={"model": "model.name", "d_sae": "sae.d_sae", "kind": "sae.kind"},
    )
    made.add_options(Run)
    made.add_options(Model, "model")
    made.add_options(Sae, "sae", skip={"d_in"})
    return made


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parser().parse(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "a", "--d-sae", "7", "--kind=topk"],
        ["--model=a", "--d_sae=7", "--kind", "topk"],
        ["--model.name", "a", "--sae.d-sae", "7", "--sae.kind", "topk"],
    ],
)
def test_short_and_full_flags_mean_the_same(argv: list[str]) -> None:
    options = parser().parse(argv)
    assert (options.model.name, options.sae.d_sae, options.sae.kind) == ("a", 7, "topk")
    assert options.sae.lr == 1e-3


def test_flags_override_the_configuration_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("tokens: 5k\nsae:\n  d_sae: 3\n  lr: 0.5\n")
    options = parser().parse(["--config", str(file), "--d-sae", "4"])
    assert (options.tokens, options.sae.d_sae, options.sae.lr) == ("5k", 4, 0.5)


def test_the_home_folder_is_written_out_after_an_equals_sign_and_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("tokens: ~/t\n")
    options = parser().parse(["--config=~/run.yaml", "--model=~/models/a"])
    assert options.model.name == str(tmp_path / "models" / "a")
    assert options.tokens == str(tmp_path / "t")
    assert parser().parse(["--model=~other"]).model.name == "~other"


def test_a_negative_or_dashed_value_is_not_taken_for_a_flag() -> None:
    assert parser().parse(["--model=some-model"]).model.name == "some-model"
    assert parser().parse(["--model", "some-model"]).model.name == "some-model"


def test_unknown_flag_names_the_nearest() -> None:
    assert refused("--d-sea", "3") == "Unknown option --d-sea; the nearest is --d-sae."
    assert "the nearest is --sae.d_sae" in refused("--sae.d_sea", "3")
    assert "--help" in refused("--zzzzzz", "3")
    assert "--sae.kin" in refused("--sae.kin", "topk")  # no silent abbreviation


def test_stray_value_and_missing_value() -> None:
    assert "'stray'" in refused("stray")
    assert "--tokens" in refused("--tokens")


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("sae: {d_sea: 3}", ["'sae.d_sea'", "'sae.d_sae'"]),
        ("tokns: 3", ["'tokns'", "'tokens'"]),
        ("sae: {d_sae: many}", ["sae.d_sae", "whole number", "'many'"]),
        ("sae: {kind: foo}", ["sae.kind", "'gba'", "'topk'", "foo"]),
        ("sae: [1, 2]", ["sae"]),
        ("sae: {d_sae: 3", ["bad.yaml"]),
        ("just text", ["bad.yaml"]),
    ],
)
def test_bad_configuration_file(tmp_path: Path, yaml: str, words: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml)
    message = refused("--config", str(file))
    for word in words:
        assert word in message, message


def test_missing_configuration_file() -> None:
    assert "nowhere.yaml" in refused("--config", "nowhere.yaml")


def test_wrong_type_names_flag_expectation_and_value() -> None:
    assert refused("--d-sae", "x") == (
        "--sae.d_sae must be a whole number or empty (null), got 'x'."
    )
    assert "'gba', 'topk'" in refused("--kind", "foo")


def test_help_has_example_defaults_and_short_forms(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse(["--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    assert "sae-apps train --d-sae 8" in text and "Number of latents." in text
    assert "--d-sae, --sae.d_sae" in text and "default: 0.001" in text and "--dry-run" in text


def test_take_builds_a_dataclass_and_names_what_is_missing() -> None:
    assert take(Sae, {"d_in": 4, "kind": "topk", "other": 1}) == Sae(d_in=4, kind="topk")
    with pytest.raises(UserError, match="--d-in"):
        take(Sae, {"kind": "topk"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("200k", 200_000), ("1M", 1_000_000), ("1_000_000", 1_000_000), ("1.5m", 1_500_000), (7, 7)],
)
def test_token_count(text: int | str, value: int) -> None:
    assert token_count(text) == value


@pytest.mark.parametrize("text", ["", "0", "-5", "1.0001k", "many", "1e6", 0, "k", "1 M M"])
def test_token_count_refuses(text: int | str) -> None:
    with pytest.raises(UserError, match="--tokens must be a count"):
        token_count(text)


def test_first_difference_is_blind_to_order_and_names_the_key() -> None:
    old = {"a": 1, "sae": {"k": (1, 2), "d": 4}}
    assert first_difference(old, {"sae": {"d": 4, "k": [1, 2]}, "a": 1}) is None
    new = {"a": 1, "sae": {"k": (1, 2), "d": 5}}
    assert first_difference(old, new) == "sae.d is 4 there and 5 here"
    assert first_difference(old, {"a": 1}) == "sae.k is [1, 2] there and 'not set' here"


def test_plain_makes_valid_json() -> None:
    import numpy as np

    value = {"a": float("nan"), "b": np.arange(2), "c": Sae(1), "d": Path("x"), "e": np.float32(1)}
    back = json.loads(to_json(value))
    assert back["a"] is None and back["b"] == [0, 1] and back["c"]["d_in"] == 1
    assert back["d"] == "x" and back["e"] == 1.0
    assert plain((1, {2})) == [1, [2]]


def test_small_texts() -> None:
    assert one_line(" a\n  b\t c ") == "a b c"
    assert nearest("trian", ["train", "demo"]) == ["train"]
    assert nearest("zzz", ["train"]) == []
    assert (size(10), size(1536), size(3 * 2**30)) == ("10 B", "1.5 KiB", "3.0 GiB")
    assert [duration(s) for s in (45, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_off_a_terminal_prints_occasional_lines() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("train", 100, "steps", initial=10, stream=stream, clock=clock) as shown:
        for second in range(1, 21):
            clock.now = second
            shown.update(4)
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 6
    # 18 = 10 from before + 2 seconds of 4; the rate counts only this run's
    assert lines[0] == "train: 18 of 100 steps (18%), 4 steps/s, 20 s left"


def test_progress_shows_nothing_for_short_or_silenced_work() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("train", 100, "steps", stream=stream, clock=clock) as shown:
        clock.now = 1.9
        shown.update(100)
    with Progress("train", 9, "steps", stream=stream, clock=clock, enabled=False) as shown:
        clock.now = 50
        shown.update(9)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress("train", 3, "steps", stream=stream) as shown:
        assert shown._bar is not None and shown._bar.total == 3
        shown.update(2)
        assert shown._bar.n == 2
        shown.update_to(3)
        assert shown._bar.n == 3
    assert stream.getvalue() == ""  # under two seconds: not shown


def test_progress_passes_items_through() -> None:
    assert list(progress("abc", "x", 3, "letters")) == ["a", "b", "c"]


def test_bad_input_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def bad() -> None:
        raise UserError("expected a,\n  got b.")

    assert run_guarded(bad) == 2
    assert capsys.readouterr().err == "sae-apps: error: expected a, got b.\n"


def test_full_disk_is_bad_input_and_a_defect_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")

    def defect() -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    assert run_guarded(full) == 2
    assert capsys.readouterr().err == "sae-apps: error: The disk is full: /x/y.\n"
    with pytest.raises(OSError, match="Bad file"):
        run_guarded(defect)


SIGNALS = pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


@SIGNALS
def test_a_signal_stops_at_once(signum: signal.Signals, code: int) -> None:
    before = signal.getsignal(signum)

    def body() -> None:
        with catch_signals():
            try:
                os.kill(os.getpid(), signum)
                time.sleep(5)
            except Exception as error:  # an error handler on the way must not swallow it
                raise AssertionError("swallowed") from error
            raise AssertionError("work went on after the signal")

    assert run_guarded(body) == code
    assert signal.getsignal(signum) is before


@SIGNALS
def test_a_deferred_signal_waits_for_the_check(signum: signal.Signals, code: int) -> None:
    steps = []

    def body() -> None:
        with catch_signals() as stop, stop.deferred():
            stop.check()
            os.kill(os.getpid(), signum)
            steps.append("finished")
            stop.check()
            steps.append("went on")

    assert run_guarded(body) == code
    assert steps == ["finished"]


def test_a_second_signal_waits_too_where_a_launcher_sends_its_own() -> None:
    with pytest.raises(Interrupted), catch_signals() as stop, stop.deferred(patient=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        stop.check()


def test_second_signal_ends_at_once() -> None:
    program = (
        "import os, signal\n"
        "from sae_apps.tasks.common import catch_signals\n"
        "with catch_signals() as stop, stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('first', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "first\n")


def test_json_alone_reaches_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_stop: StopSignal) -> tuple[dict[str, int], str]:
        print("noise")
        return {"a": 1}, "text"

    assert run_command(work, as_json=True, verbose=False, quiet=False) == 0
    seen = capsys.readouterr()
    assert json.loads(seen.out) == {"a": 1} and seen.err == "noise\n"
    assert run_command(work, as_json=False, verbose=False, quiet=False) == 0
    assert capsys.readouterr().out == "text\n"


def test_interrupted_is_named() -> None:
    assert str(Interrupted(signal.SIGTERM)) == "SIGTERM"
