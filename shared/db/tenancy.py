"""No statement uses a service's own table for no tenant: a helper that cannot be forgotten."""

from shared.db.sql import STATEMENTS_CACHED_MAX

_ANY_TENANT = "/* any tenant"


class TenantCheck:
    """Looks at each statement once.

    Args:
        tables: the service's own tables that have a tenant.
    """

    def __init__(self, tables: frozenset[str]) -> None:
        self._tables = tables
        self._checked: set[str] = set()

    def require(self, sql: str) -> None:
        """Refuse a statement that neither filters by tenant nor says why it need not.

        Raises:
            ValueError: naming the table, a bug in the caller.
        """
        if sql in self._checked:
            return
        lowered = sql.lower()
        if "tenant" not in lowered.replace(_ANY_TENANT, ""):
            words = set(lowered.replace("(", " ").replace(",", " ").split())
            for table in self._tables & words:
                if _ANY_TENANT not in lowered:
                    raise ValueError(f"this statement uses {table} for no tenant: {sql}")
        if len(self._checked) >= STATEMENTS_CACHED_MAX:
            self._checked.clear()
        self._checked.add(sql)
