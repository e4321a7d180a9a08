"""Amounts of memory as text."""

import pytest

from pocktvm.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("64MB", 64_000_000), ("64MiB", 64 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096)]
    + [(" 2 kib ", 2048), ("10B", 10)],
)
def test_parse(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["lots", "", "-3MB", "0", "12XB", "MB", "1e400MB", "nanMB"])
def test_refuse(text):
    with pytest.raises(ValueError, match="MB"):
        parse_bytes(text)


def test_format():
    assert format_bytes(342e6) == "342.0 MB"
    assert format_bytes(15_432_100) == "15.4 MB"
    assert format_bytes(512) == "512 B"
