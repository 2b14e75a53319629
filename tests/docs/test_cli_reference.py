"""The reference of the command lines and the parsers know the same commands and options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

import pytest

from agent.cli import device, fleet
from agent.cli.commands import sentence
from agent.wire.ops import OPS
from tests.core.conftest import ROOT

REFERENCE = ROOT / "docs" / "reference"
PAGES = {
    program: (REFERENCE / name).read_text()
    for program, name in (("edge-agent", "cli.md"), ("edge-fleet", "edge-fleet.md"))
}
SECTIONS = {
    match[1]: match[2]
    for page in PAGES.values()
    for match in re.finditer(r"^## (edge-.+)\n((?:(?!^#{1,2} ).*\n)*)", re.sub(r"(?m)^# ", "% ", page), re.MULTILINE)
}
#: Options of every command are told once, at the top.
COMMON = {
    "edge-agent": {"-h", "--help", "--config", "--state-dir", "--run-dir", "--json"},
    "edge-fleet": {"-h", "--help", "--fleet", "--password-file", "--json"},
}


def leaves(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, by its whole name."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield name, parser
    for group in groups:
        for word, command in group.choices.items():
            yield from leaves(command, f"{name} {word}")


COMMANDS = dict([*leaves(device.parser(), "edge-agent"), *leaves(fleet.parser(), "edge-fleet")])


def section_of(name: str) -> str:
    """Operations of jobs and questions share a section: what each takes, its own help says."""
    words = name.split()
    return " ".join([*words[:2], "OP"]) if words[2:] and words[2] in OPS else name


def test_the_pages_have_each_command_and_no_other() -> None:
    assert len(COMMANDS) > 40
    assert sorted(SECTIONS) == sorted({section_of(name) for name in COMMANDS})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_tells_every_option_and_argument(name: str) -> None:
    section = SECTIONS[section_of(name)]
    told = section.partition("```")[0] + "".join(re.findall(r"(?m)^\|.*$", section))
    for action in COMMANDS[name]._actions:
        for option in action.option_strings:
            assert option in COMMON[name.split(maxsplit=1)[0]] or f"`{option}" in told, f"{name} {option}"
        if not action.option_strings:
            assert str(action.metavar) in told, f"{name} {action.metavar}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_section_tells_no_option_that_is_not_there(name: str) -> None:
    section = section_of(name)
    alike = [command for other, command in COMMANDS.items() if section_of(other) == section]
    known = {option for command in alike for action in command._actions for option in action.option_strings}
    usage = re.findall(rf"(?m)^`{section}( .*)?`$", SECTIONS[section])
    told = {option for line in usage for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)}
    assert told <= known, f"{name}: {told - known}"


@pytest.mark.parametrize("program", PAGES)
def test_options_of_all_commands_are_told_once(program: str) -> None:
    introduction = PAGES[program].partition("\n## edge-")[0]
    assert [option for option in sorted(COMMON[program]) if f"`{option}" not in introduction] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = device.main if name.startswith("edge-agent") else fleet.main
    with pytest.raises(SystemExit) as ended:
        main([*name.split()[1:], "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {name} ") and (COMMANDS[name].description or "?").split()[0] in text
    unexplained = [action.dest for action in COMMANDS[name]._actions if action.help is None]
    assert unexplained == []


def test_a_line_of_a_list_becomes_a_sentence() -> None:
    assert sentence("what is installed") == "What is installed." and sentence("is it right?") == "Is it right?"
