import re

import pytest
from error_facts import facts


@pytest.mark.parametrize(
    ("wanted", "text", "expected"),
    [
        (("`a`", 3), "3 edges of\nlayer `a`", True),
        (("`a`", 3), "3 edges of layer `b`", False),
        ((3,), "13 edges", False),
        ((3,), "30 edges", False),
        ((3,), "3.5 edges", False),
        ((3,), "0.3", False),
        ((3,), "there are 3.", True),
        ((0.5,), "`x` = 0.5; allowed: less", True),
        ((0.5,), "10.5 or 0.55", False),
        ((-1,), "got -1", True),
        (("(0, 1]",), "a number in (0, 1]", True),
        (("(0, 1]",), "a number in [0, 1]", False),
        (("a", "a.c"), "abc", False),
    ],
)
def test_a_text_has_all_facts_in_any_order_or_does_not_match(wanted, text, expected):
    assert bool(re.search(facts(*wanted), text)) is expected
