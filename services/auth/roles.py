"""What each role may do, read from the contracts: a new scope needs no code here."""

from dataclasses import dataclass
from typing import Self

from services.auth.domain import KeyKind
from shared.rpc.policy import Access, contract_policies


@dataclass(frozen=True)
class Roles:
    """The scopes of each role.

    Attributes:
        user: every scope that a method for users names.
        admin: every scope that any method names.
    """

    user: frozenset[str]
    admin: frozenset[str]

    @classmethod
    def of_contracts(cls) -> Self:
        """The roles that the contracts imply."""
        policies = contract_policies().values()
        user = [policy.scopes for policy in policies if policy.access is Access.USER]
        return cls(
            user=frozenset().union(*user),
            admin=frozenset().union(*(policy.scopes for policy in policies)),
        )

    def of_key(self, kind: KeyKind) -> frozenset[str]:
        """What the owner of a key of this kind may do at most."""
        return self.admin if kind is KeyKind.ADMIN else self.user
