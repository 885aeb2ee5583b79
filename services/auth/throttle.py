"""How often log-ins may be tried for one address, by whoever tries.

Kept in this process: with several, an address has as many budgets. It never locks anybody out:
the longest wait is one refill. An attacker who tries without pause competes with the owner for
those; the edge's limit per network address is what stops the attacker.
"""

from collections import OrderedDict

from services.auth.domain import EmailAddress, LoginThrottled, TryBudget
from shared.clock import Clock

ADDRESSES_MAX = 50_000


class LoginThrottle:
    """Counts tries per tenant and address; forgets those longest idle when full."""

    def __init__(self, clock: Clock, *, budget: TryBudget | None = None) -> None:
        self._clock = clock
        self._budget = budget or TryBudget()
        self._full_at_s: OrderedDict[tuple[str, str], float] = OrderedDict()

    def take(self, tenant: str, email: EmailAddress) -> None:
        """Count one try, before the password is looked at.

        Raises:
            LoginThrottled: too many lately.
        """
        key = (tenant, email.canonical)
        full_at_s = self._full_at_s.pop(key, 0.0)
        full_at_s, wait_s = self._budget.take(full_at_s, self._clock.monotonic_s())
        self._full_at_s[key] = full_at_s
        if len(self._full_at_s) > ADDRESSES_MAX:
            self._full_at_s.popitem(last=False)
        if wait_s > 0:
            raise LoginThrottled(wait_s)

    def forget(self, tenant: str, email: EmailAddress) -> None:
        """The password was right: the budget is whole again."""
        self._full_at_s.pop((tenant, email.canonical), None)
