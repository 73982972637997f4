import pytest

from actprune.core.text import short
from actprune.report.text import change, count, percent, points, signed


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (19_978, "20k"),
        (999_499, "999k"),
        (999_999, "1M"),  # rounding crosses the unit
        (1_254_400, "1.25M"),
        (4.1e9, "4.1G"),
        (2.5e12, "2.5T"),
    ],
)
def test_short(number, text):
    assert short(number) == text


def test_short_with_more_digits():
    assert short(1_237_500, 5) == "1.2375M"


@pytest.mark.parametrize(
    ("spelled", "text"),
    [
        (count(1254400), "1,254,400"),
        (percent(0.398), "39.8 %"),
        (percent(0.398, 0), "40 %"),
        (points(0.0028), "+0.28"),
        (points(-0.0028), "-0.28"),
        (points(-0.00001), "+0.00"),
        (signed(-0.004), "+0.00"),
        (signed(-0.006), "-0.01"),
        (change(20000, 8000), "-60.0 %"),
        (change(20000, 20000), "+0.0 %"),
        (change(20000, 19999), "+0.0 %"),
    ],
)
def test_spelling(spelled, text):
    assert spelled == text
