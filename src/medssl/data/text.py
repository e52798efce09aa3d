"""Texts that users wrote: UTF-8, with or without the mark that some programs put before it."""

from pathlib import Path


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        ValueError: The file is not UTF-8; the message names the line.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8; save the table with the encoding UTF-8") from error
