"""Dataclasses as command-line flags and YAML keys, with errors of one sentence.

A thin layer over jsonargparse: nested flags (``--sae.d_sae``) get the short forms that people type
(``--d-sae``), every error is condensed to one sentence that names the nearest existing option, and
the flags that all commands share are declared once.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from sae_core.errors import UserError

from .common import PROG, nearest, one_line

HELP_COLUMN = 24  # where argparse starts the help text of an option


class CommandParser(ArgumentParser):
    """Parser of one command.

    Args:
        command: its name, e.g. ``train``.
        description: what it does, one or two sentences.
        example: a complete command line.
        short: short form -> full key, e.g. ``{"d_sae": "sae.d_sae"}``; people type ``--d-sae``.
        has_settings: whether it has settings to read from a file and work to estimate.
    """

    def __init__(
        self,
        command: str,
        description: str,
        example: str,
        *,
        short: Mapping[str, str] | None = None,
        has_settings: bool = True,
    ) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            prog=f"{PROG} {command}",
            usage=f"{PROG} {command}{' [--config FILE.yaml]' * has_settings} [options]",
            description=description,
            exit_on_error=False,
            allow_abbrev=False,
            default_env=False,
        )
        self._example, self._short = example, dict(short or {})
        self._groups: list[str] = []
        self._switches: set[str] = set()  # boolean keys: --stored is short for --stored true
        if has_settings:
            self.add_argument(
                "--config",
                action="config",
                help="YAML file with the keys that --print_config shows.",
            )
            self.add_argument(
                "--dry-run",
                action="store_true",
                help="Write nothing; estimate tokens, disk, memory and time.",
            )
        for flag, text in (
            ("--json", "Print the result as one JSON object on stdout."),
            ("--verbose", "Log details."),
            ("--quiet", "Log nothing but errors, show no progress."),
        ):
            self.add_argument(flag, action="store_true", help=text)

    def add_options(self, cls: type, key: str | None = None, skip: set[str] | None = None) -> None:
        """Add the fields of a dataclass, under ``key.`` where one is given."""
        self.add_class_arguments(cls, key, skip={*(skip or ())})
        prefix = f"{key}." if key else ""
        hints = get_type_hints(cls)
        self._switches |= {f"{prefix}{f.name}" for f in fields(cls) if hints[f.name] is bool}
        if key is not None:
            self._groups.append(key)

    def use_preset(
        self, argv: Sequence[str], flag: str, presets: Mapping[str, Mapping[str, Any]], key: str
    ) -> None:
        """Let ``flag NAME``, also in a configuration file, change the defaults below ``key``; flags
        and files override it."""
        for before, arg in zip(["", *argv], argv, strict=False):
            name = arg if before == flag else None
            if arg.startswith(f"{flag}="):
                name = arg.removeprefix(f"{flag}=")
            if before == "--config" or arg.startswith("--config="):
                name = _value_in(Path(arg.removeprefix("--config=")), flag.removeprefix("--"))
            if isinstance(name, str) and name in presets:  # the parser refuses an unknown name
                self.set_defaults({f"{key}.{k}": v for k, v in presets[name].items()})

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Raises:
        UserError: anything that cannot be understood, in one sentence.
        """
        args = [self._long(arg) for arg in argv]
        for number, arg in enumerate(args):
            following = args[number + 1] if number + 1 < len(args) else "--"
            if arg.removeprefix("--") in self._switches and following.startswith("--"):
                args[number] = f"{arg}=true"
        for before, arg in zip(["", *args], args, strict=False):
            if before == "--config" or arg.startswith("--config="):
                self._check_file(Path(arg.removeprefix("--config=")).expanduser())
        try:
            return _at_home(self.parse_args(args))
        except UserError:
            raise
        except Exception as error:  # argparse, YAML and type errors share no base class
            raise UserError(self._condense(str(error))) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(self._condense(message)) from ex

    def format_help(self) -> str:
        text = super().format_help()
        # The flags that load one group from a file would hide the short forms of the same name.
        text = re.sub(r"^  --\w+ CONFIG +Path to a configuration file\.\n", "", text, flags=re.M)
        text = re.sub(r"^  --[a-z_]+", lambda m: m[0].replace("_", "-"), text, flags=re.M)
        for short, key in self._short.items():
            text = re.sub(
                rf"^  --{re.escape(key)} (\S.*?)(?:\n| {{2,}}) *",
                f"  --{short.replace('_', '-')}, --{key} \\1\n" + " " * HELP_COLUMN,
                text,
                flags=re.M,
            )
        return f"{text}\nexample:\n  {self._example}\n"

    def _long(self, arg: str) -> str:
        """The flag as jsonargparse knows it: underscores, full key."""
        if not arg.startswith("--") or arg == "--":
            return arg
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name == "dry_run":
            name = "dry-run"
        return f"--{self._short.get(name, name)}{equals}{value}"

    def _check_file(self, path: Path) -> None:
        """Refuse what jsonargparse would pass over in silence or without naming the file."""
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"The configuration file {path} does not exist.") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"The configuration file {path} cannot be read: {one_line(str(error))}."
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                f"The configuration file {path} must hold keys with values, "
                f"got {type(config).__name__}."
            )
        for key in self._groups:
            if key in config and not isinstance(config[key], dict):
                raise UserError(
                    f"The key {key!r} in {path} must hold keys with values, got {config[key]!r}."
                )

    def _names(self) -> list[str]:
        """Every flag a user can type, without the leading dashes."""
        known = [
            option[2:]
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--")
        ]
        return [name.replace("_", "-") for name in self._short] + known

    def _condense(self, message: str) -> str:
        """One sentence out of jsonargparse's message."""
        if match := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
            return self._unknown_flag(match[1])
        if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
            return self._unknown_key(f"{match[1]}.{match[2]}")
        if match := re.search(r"Option '([\w.]+)' is not accepted", message):
            return self._unknown_key(match[1])
        if match := re.search(r'Parser key "([\w.]+)"(?: element \d+)?:(.*)', message, flags=re.S):
            return self._wrong_value(match[1], match[2])
        return one_line(message)

    def _unknown_flag(self, flag: str) -> str:
        name = flag.lstrip("-").partition("=")[0]
        if not flag.startswith("-"):
            return f"Unexpected argument {flag!r}: values follow a flag, e.g. {self._example}"
        found = nearest(name.replace("_", "-"), self._names()) or nearest(name, self._names())
        hint = f"the nearest is --{found[0]}" if found else f"see {self.prog} --help"
        return f"Unknown option --{name.replace('_', '-') if '.' not in name else name}; {hint}."

    def _unknown_key(self, key: str) -> str:
        keys = [name for name in self._names() if name not in self._short]
        found = nearest(key, keys) or nearest(key.rpartition(".")[2], keys)
        hint = f"the nearest is {found[0]!r}" if found else f"see {self.prog} --print_config"
        return f"Unknown key {key!r} in the configuration; {hint}."

    def _wrong_value(self, key: str, detail: str) -> str:
        given = re.search(r"(?:Given value|Got value): (.*)", detail)
        expected = re.findall(r"Expected an? (.*?)(?:\.? Got value|\n|$)", detail)
        names = list(dict.fromkeys(_type_name(item) for item in expected))
        if not given or not names:
            return f"--{key}: {one_line(detail)}"
        return f"--{key} must be {' or '.join(names)}, got {given[1].strip()!r}."


def _at_home(options: Namespace) -> Namespace:
    """``~/x`` as the shell writes it out after a blank: it does not after ``=`` or in a file."""
    for key, value in list(options.items()):
        if isinstance(value, list):
            options[key] = [_expanded(one) for one in value]
        else:
            options[key] = _expanded(value)
    return options


def _expanded(value: Any) -> Any:
    is_home = isinstance(value, str) and value.startswith("~/")
    return os.path.expanduser(value) if is_home else value


def _value_in(path: Path, key: str) -> Any:
    """What a configuration file says under a key; None where it cannot be read, which the parser
    tells."""
    try:
        config = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return config.get(key) if isinstance(config, dict) else None


def _type_name(text: str) -> str:
    """``<class 'int'>`` -> ``int``; ``typing.Literal['a', 'b']`` -> ``one of 'a', 'b'``."""
    text = text.strip().rstrip(".")
    if match := re.fullmatch(r"<class '([\w.]+)'>", text):
        names = {
            "int": "a whole number",
            "float": "a number",
            "str": "text",
            "bool": "true or false",
        }
        return names.get(match[1], "empty (null)" if match[1] == "NoneType" else match[1])
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", text):
        return f"one of {match[1]}"
    return text


def take(cls: type, values: Mapping[str, Any] | Namespace) -> Any:
    """Build the dataclass ``cls``, and the dataclasses inside it, from those of ``values`` it has.

    Raises:
        UserError: a field without default is absent, or the dataclass refuses a value.
    """
    if not isinstance(values, Mapping | Namespace):
        raise UserError(f"Expected the fields of {cls.__name__}, got {values!r:.100}.")
    given = values.as_dict() if isinstance(values, Namespace) else dict(values)
    hints = get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in given:
            value, hint = given[field.name], hints[field.name]
            if value is None and hint is not Any and NoneType not in get_args(hint):
                name = field.name.replace("_", "-")
                raise UserError(f"A value for --{name} is needed, got null.")
            if is_dataclass(hints[field.name]) and isinstance(value, Mapping):
                value = take(hints[field.name], value)
            # JSON has no tuples
            chosen[field.name] = tuple(value) if isinstance(value, list) else value
        elif field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"A value for --{field.name.replace('_', '-')} is needed.")
    return cls(**chosen)
