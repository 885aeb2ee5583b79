import pytest

from services.notification.money import amount_text


@pytest.mark.parametrize(
    ("minor_units", "currency_code", "text"),
    [
        (1250, "EUR", "12.50 EUR"),
        (5, "EUR", "0.05 EUR"),
        (0, "EUR", "0.00 EUR"),
        (1250, "JPY", "1250 JPY"),
        (1250, "KWD", "1.250 KWD"),
        (1, "CLF", "0.0001 CLF"),
        (-1205, "EUR", "-12.05 EUR"),
        (2**63 - 1, "EUR", "92233720368547758.07 EUR"),
    ],
)
def test_every_minor_unit_is_shown(minor_units, currency_code, text):
    assert amount_text(minor_units, currency_code) == text
