from __future__ import annotations

import pytest

from motet.core.errors import UserError
from motet.core.hostlist import expand


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-3,07-09],a-b2", ["n1", "n2", "n3", "n07", "n08", "n09", "a-b2"]),
        ("gpu[098-101]", ["gpu098", "gpu099", "gpu100", "gpu101"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
        ("c.site.org,d[2]", ["c.site.org", "d2"]),
    ],
)
def test_a_node_list_is_expanded_without_scontrol(text: str, names: list[str]) -> None:
    assert expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[a]", "n 1", "n1;id", "n[1-99999999]", "$(id)", "n[]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="node list"):
        expand(text)
