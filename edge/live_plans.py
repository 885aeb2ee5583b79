"""The plans in force: settings, then a file, then what an operator has set; changed while running.

Whatever cannot be read or is wrong leaves the plans as they are, and is logged with the key that
is wrong.
"""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import orjson

from shared import log
from shared.config import ConfigError
from shared.quota.gcra import Quota
from shared.quota.keys import Level
from shared.quota.plans import Plans, limit_text

FILE_BYTES_MAX = 4 * 1024 * 1024

_log = log.get_logger("edge.quota")


class LivePlans:
    """Plans that follow their file and their overrides.

    Args:
        base: from the settings.
        buckets: those that contracts name.
        file: TOML, see shared.quota.plans; None for none.

    Raises:
        ConfigError: the file cannot be read, or is wrong: it names the key.
    """

    def __init__(self, base: Plans, buckets: frozenset[str], file: Path | None) -> None:
        self._base = base
        self._buckets = buckets | base.buckets
        self._file = file
        self._overrides: Mapping[str, str] = {}
        self._mark = _mark_of(file) if file is not None else None
        self._of_file = self._read()
        self.current = self._of_file
        self.on_change: Callable[[], None] = lambda: None

    def limit(self, bucket: str, tenant: str, level: Level) -> Quota | None:
        """The limit in force; None if there is none."""
        return self.current.quota(tenant, bucket, level)

    async def refresh(self) -> None:
        """Read the file again if it has changed."""
        if self._file is None:
            return
        mark = await asyncio.to_thread(_mark_of, self._file)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._of_file = await asyncio.to_thread(self._read)
        except ConfigError as error:
            _log.warning("quota plans not changed", reason=str(error))
        else:
            self._put_together()

    def override(self, fields: Mapping[str, str]) -> None:
        """What the operator has set, all of it."""
        self._overrides = dict(fields)
        self._put_together()

    def as_json(self) -> bytes:
        """What is in force, for the operator's commands."""
        rows = [
            {"plan": plan, "bucket": bucket, "level": level, "limit": limit_text(quota)}
            for plan, bucket, level, quota in self.current.rows()
        ]
        return orjson.dumps({"limits": rows, "tenants": dict(self.current.tenants)})

    def _put_together(self) -> None:
        try:
            plans = self._of_file.with_overrides(self._overrides)
            plans.require_known(self._buckets, "overrides")
        except ConfigError as error:
            _log.warning("quota overrides not obeyed", reason=str(error))
            plans = self._of_file
        if plans != self.current:
            self.current = plans
            self.on_change()
            _log.info("quota plans changed")

    def _read(self) -> Plans:
        if self._file is None:
            return self._base
        source = f"TENFOLD_QUOTA_PLANS={self._file}"
        try:
            with self._file.open(encoding="utf-8") as opened:
                text = opened.read(FILE_BYTES_MAX + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{source} cannot be read: {reason}.") from error
        if len(text) > FILE_BYTES_MAX:
            raise ConfigError(f"{source} is larger than {FILE_BYTES_MAX} bytes.")
        plans = self._base.with_file(text, source)
        plans.require_known(self._buckets, source)
        return plans


def _mark_of(file: Path) -> tuple[int, int, int] | None:
    """What changes with the file's content; None if there is no such file."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
