"""Errors on one line, for the command line and for tables."""

__all__ = ["one_line"]


def one_line(error: BaseException) -> str:
    """Return kind and text of an error without line breaks.

    One raised in a loading process carries that process's traceback before its own text, which is left out.
    """
    kind, text = type(error).__name__, str(error)
    if "Traceback" in text:
        text = text.rpartition(f"{kind}: ")[2]
    return f"{kind}: {' '.join(text.split())}"
