"""How threads wait for each other."""

from __future__ import annotations

import pytest

from rcpo.system.machine import limit_waiting


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
    ],
)
def test_how_long_threads_wait_is_set_where_the_user_has_not(
    given: dict[str, str], found: dict[str, str]
) -> None:
    limit_waiting(given)
    assert given == found
