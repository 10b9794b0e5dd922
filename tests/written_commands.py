"""Checks a command as it stands in a text (README, recipe header), without running it."""

import shlex

import typer

from arae.cli import app
from arae.cli.options import recipe_and_space
from arae.config import load_options, load_recipe

CLI = typer.main.get_command(app)


def split_commands(line: str) -> list[list[str]]:
    """The words of each command of a shell line; comments and what `&&` joins are taken apart."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def check_arae(words: list[str]) -> None:
    """Fail unless `arae` has the verb, the verb takes these flags, and the recipe takes these overrides."""
    assert words, "which verb?"
    verb, *rest = words
    assert hasattr(CLI, "commands")
    assert verb in CLI.commands, f"arae has no verb {verb}: {sorted(CLI.commands)}"
    given = CLI.commands[verb].make_context(verb, rest).params  # refuses unknown flags and what is missing
    overrides = list(given.get("overrides") or ())
    if verb == "demo":
        own = any(text.startswith("data.source=") for text in overrides)
        load_recipe("demo-images" if own else "demo", overrides)
    elif verb == "encode":
        from arae.data.encode import EncodeOptions

        load_options(EncodeOptions, list(given["options"] or ()), where=verb)
    elif given.get("recipe") and not given["recipe"].startswith("runs/"):  # a run folder is there after a run only
        space = given.get("space") or next((text for text in overrides if "=" not in text), None)
        if space is None:
            load_recipe(given["recipe"], overrides)
        else:
            recipe_and_space(given["recipe"], space, [text for text in overrides if "=" in text])
