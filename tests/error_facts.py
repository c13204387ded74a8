"""What an error must say, without the sentence that says it: shared by the tests of errors."""

import re


def facts(*wanted: object) -> str:
    """A pattern for `pytest.raises(match=...)`: all of `wanted` occur, in any order.

    A number matches whole: 1 is not found in 10 or 0.1. Names and values are given as texts.
    """
    return "(?s)^" + "".join(f"(?=.*{_pattern(fact)})" for fact in wanted)


def _pattern(fact: object) -> str:
    text = re.escape(str(fact))
    return text if isinstance(fact, str) else rf"(?<![\d.]){text}(?!\.?\d)"
