"""Escapes untrusted text for a terminal or a log."""


def printable(text: str) -> str:
    """`text` with characters that cannot be printed as escapes, such as `\\x1b`. Line breaks stay. Without this, a name
    that a client chose could move the terminal's cursor or imitate another line of a log."""
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or character.isprintable() else ascii(character)[1:-1]
        for character in text
    )
