"""Amounts as people read them: exact, by the currency's own exponent."""

DEFAULT_EXPONENT = 2

# ISO 4217, list one: the currencies whose minor unit is not a hundredth.
_CODES = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF",
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "CLF UYW",
}
EXPONENTS = {code: exponent for exponent, codes in _CODES.items() for code in codes.split()}


def amount_text(minor_units: int, currency_code: str) -> str:
    """Write an amount with its currency: (1250, "EUR") is "12.50 EUR", (5, "JPY") is "5 JPY".

    Integer arithmetic only: every minor unit is shown, none is rounded away.
    """
    exponent = EXPONENTS.get(currency_code, DEFAULT_EXPONENT)
    sign = "-" if minor_units < 0 else ""
    whole, rest = divmod(abs(minor_units), 10**exponent)
    fraction = f".{rest:0{exponent}d}" if exponent else ""
    return f"{sign}{whole}{fraction} {currency_code}"
