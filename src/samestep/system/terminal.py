"""Prints text without control characters.

Names in files from elsewhere may hold escape sequences that make a terminal show
something that is not there.
"""

import unicodedata

import click


def clean(text: object) -> str:
    """Replace characters that are invisible or turn the text's direction.

    Each becomes its escape, such as \\u202e; line breaks and tabs stay.
    """
    return "".join(
        character if character in "\n\t" or _shows(character) else _escape(character)
        for character in str(text)
    )


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a line on stdout, or on stderr if `err`; control characters are escaped."""
    click.echo(clean(text), err=err, nl=nl)


def echo_row(name: str, value: object) -> None:
    """Print a name and its value, which all begin in one column."""
    echo(f"{name:<12}{value}")


def _shows(character: str) -> bool:
    return unicodedata.category(character)[0] != "C"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
