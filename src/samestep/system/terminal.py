"""What a person reads: nothing in it moves a cursor or turns the text's direction.

Names in a file from elsewhere may hold escape sequences, with which a terminal can be
made to show something else than what is there.
"""

import unicodedata

import click


def clean(text: object) -> str:
    """Without characters that do not show or that turn the text's direction.

    They appear as their escape, such as \\u202e; a line break and a tab are kept.
    """
    return "".join(
        character if character in "\n\t" or _shows(character) else _escape(character)
        for character in str(text)
    )


def echo(text: object, *, err: bool = False, nl: bool = True) -> None:
    """Everything that a command prints goes through here, or through `clean`."""
    click.echo(clean(text), err=err, nl=nl)


def _shows(character: str) -> bool:
    return unicodedata.category(character)[0] != "C"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
