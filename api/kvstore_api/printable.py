"""Text from elsewhere, made fit for a terminal or a log."""


def printable(text: str) -> str:
    """The text with whatever cannot be printed written out, such as `\\x1b`; line breaks stay. What a client calls
    itself might move the cursor of whoever reads it, or look like a line of somebody else."""
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or character.isprintable() else ascii(character)[1:-1]
        for character in text
    )
