"""How figures are shown."""

import pytest

from steps.dispatch.render import four_digits


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.012345, "0.01235"),
        (82.381, "82.38"),
        (999.94, "999.9"),
        (10190.3, "10,190"),
        (2e9, "2,000,000,000"),
    ],
)
def test_figures_have_four_digits_and_no_exponent(value, shown):
    assert four_digits(value) == shown
