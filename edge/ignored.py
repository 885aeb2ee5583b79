"""What lenient methods ignore: logged once per field, so that a contract can be tightened safely.

A method whose contract says ignore_unknown takes requests that hold more than it knows. Each
such name is logged at debug when it first appears in this process; how often is not counted.
"""

from shared import log

# Names are made up by callers: what is remembered of them is bounded, and so is the log.
NAMES_MAX, NAME_CHARACTERS_MAX = 1000, 64

_log = log.get_logger("edge")


class Ignored:
    """The names that were ignored so far."""

    def __init__(self) -> None:
        self._names: set[tuple[str, str]] = set()

    def note(self, where: str, name: str) -> None:
        """Remember a name, and log it if it is new.

        Args:
            where: the full name of the message or enum that does not have it.
            name: as the caller wrote it.
        """
        key = where, name[:NAME_CHARACTERS_MAX]
        if key not in self._names and len(self._names) < NAMES_MAX:
            self._names.add(key)
            _log.debug("unknown name ignored", where=where, name=key[1])
