"""How a command is added to a parser: with one line for lists of commands and for its own help."""

from __future__ import annotations

import argparse
from typing import Any

Commands = Any  # argparse's subparsers action is generic in a private class


def add_command(commands: Commands, common: argparse.ArgumentParser, name: str, text: str) -> argparse.ArgumentParser:
    """A command below ``commands`` that takes the ``common`` options too."""
    made: argparse.ArgumentParser = commands.add_parser(name, parents=[common], help=text, description=sentence(text))
    return made


def name_model(command: argparse.ArgumentParser) -> None:
    """The argument that names an installed model."""
    command.add_argument("model", metavar="MODEL", help="its name, as 'edge-agent models list' shows it")


def sentence(text: str) -> str:
    """A command's line in a list as the opening of its own help."""
    return text[:1].upper() + text[1:] + ("" if text.endswith("?") else ".")
