"""Principal: who asks, for which tenant; the signed token between hops.

The edge turns any credential into a short-lived token signed with its own key;
a service that calls another signs one of its own or passes on the caller's.
Every service verifies the token itself: nothing is trusted because of where it
came from.
"""

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

DEFAULT_TENANT = "default"


class PrincipalKind(StrEnum):
    """What sort of caller this is."""

    PUBLIC = "public"
    USER = "user"
    SERVICE = "service"
    ADMIN = "admin"


@dataclass(frozen=True)
class Principal:
    """Who asks.

    Attributes:
        kind: decides, with scopes, which methods may be called.
        subject: the user's id, the service account's id, or a service's name as text;
            "" for PUBLIC.
        tenant: whose data may be seen.
        scopes: what the credential allows, already cut to what the subject holds.
        credential: id of the session or API key, for revocation; "" for none.
    """

    kind: PrincipalKind
    subject: str
    tenant: str = DEFAULT_TENANT
    scopes: frozenset[str] = frozenset()
    credential: str = ""

    @property
    def owner(self) -> UUID:
        """The id that owns what this principal makes; only users and service accounts have one."""
        return UUID(self.subject)

    @property
    def scope(self) -> tuple[str, UUID]:
        """(tenant, owner): the filter of every statement about own resources."""
        return self.tenant, self.owner

    def may(self, scope: str) -> bool:
        """Whether the credential carries this scope."""
        return scope in self.scopes


PUBLIC = Principal(PrincipalKind.PUBLIC, "")
