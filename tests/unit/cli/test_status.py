"""Reports of mounts as text."""

import pytest

from tartapefs.cli.status import bar


@pytest.mark.parametrize(
    ("ranges", "cells"),
    [
        ([], "..........."),
        ([[0, 1000]], "###########"),
        ([[0, 1]], "+.........."),
        ([[999, 1000]], "..........+"),
        ([[0, 90], [91, 1000]], "#+#########"),
        ([[10, 20], [30, 40], [500, 510]], "+....+....."),
        ([[50, 600]], "+#####+...."),
    ],
)
def test_the_bar(ranges: list[list[int]], cells: str) -> None:
    assert bar(ranges, 1000, cells=11) == cells
