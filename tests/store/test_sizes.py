"""Sizes of memory as people write them."""

from __future__ import annotations

import pytest

from store.errors import InvalidInput
from store.sizes import parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5GiB", 3 * 2**29), ("2GB", 2 * 10**9), ("10mb", 10**7), ("4096", 4096)],
)
def test_units_mean_powers_of_1024_or_1000(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["2G", "", "GiB", "-1GiB", "0", "two", "1e9", "nan", "1 2GiB"])
def test_what_is_no_size_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(InvalidInput, match="size of memory"):
        parse_bytes(text)


def test_sizes_are_shown_with_three_figures() -> None:
    assert [show_bytes(n) for n in (12, 2048, 5 * 2**20, 3 * 2**29)] == ["12 B", "2.00 KiB", "5.00 MiB", "1.50 GiB"]
