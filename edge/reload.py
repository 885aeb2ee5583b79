"""Contracts that change while they are served.

A new set is looked for every while, and at once on SIGHUP. It is read, checked and compiled as one
unit beside the loop, compared with what is served, and only then put in its place, between two
requests; what is in flight ends with the old one. What cannot be served, or would break a
client, is refused with a report, and the old set stays.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from edge.api import Api, compile_routes
from edge.changes import Changes, changes_between
from edge.compiled import forget
from edge.contracts import ContractError
from edge.foreign import Tell
from edge.sources import Found, Source
from shared import log
from shared.config import ConfigError

# While a new set is compiled in its thread, requests get their turn after so long, instead of
# after Python's 5 ms.
TURN_S = 0.0005
# Of a report; the log is no place for a thousand routes.
LINES_MAX = 50
ALLOW_BREAKING = "--allow-breaking (TENFOLD_EDGE_RELOAD_BREAKING=true) lets it in"

_log = log.get_logger("edge.contracts")


class Reloader:
    """Keeps what one edge process serves up to date.

    Args:
        source: where contracts come from.
        api: what is served.
        compile: makes an Api of what was found; ContractError or ConfigError if it cannot be
            served. Called in a thread.
        serve: puts an Api in place of the one before.
        poll_s: how often to look for a change; 0 for only when asked.
        allows_breaking: whether clients may be broken.
        tell: takes each sentence of a report.
    """

    def __init__(
        self,
        source: Source,
        api: Api,
        compile: Callable[[Found], Api],  # noqa: A002 - that is what it does
        serve: Callable[[Api], None],
        *,
        poll_s: float,
        allows_breaking: bool,
        tell: Tell,
    ) -> None:
        self._source = source
        self._api = api
        self._compile = compile
        self._serve = serve
        self._poll_s = poll_s
        self._allows_breaking = allows_breaking
        self._tell = tell
        self._seen = api.digest  # of what was looked at last, be it served or refused
        self._trouble = ""
        self._asked = asyncio.Event()
        self._lock = asyncio.Lock()

    def ask(self) -> None:
        """Look now, and report in any case; for signal handlers."""
        self._asked.set()

    async def run(self) -> None:
        """Look for changes until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._poll_s or None):
                    await self._asked.wait()
            is_asked = self._asked.is_set()
            self._asked.clear()
            if is_asked or await self._source.may_have_changed():
                await self.reload(is_asked=is_asked)

    async def reload(self, *, is_asked: bool = True) -> bool:
        """Look, and serve what is new.

        Args:
            is_asked: whether somebody wants to hear of it when nothing has changed.

        Returns:
            Whether another set is served now.
        """
        async with self._lock:
            try:
                return await self._reload(is_asked=is_asked)
            except (ContractError, ConfigError) as error:
                self._keep(str(error), is_asked=is_asked)
            except Exception as error:
                _log.exception("contracts not read")
                self._keep(f"{type(error).__name__}; the log has more", is_asked=is_asked)
            return False

    async def _reload(self, *, is_asked: bool) -> bool:
        found = await self._source.find()
        if found.digest == self._api.digest:
            self._seen, self._trouble = found.digest, ""
            if is_asked:
                self._tell("the contracts are those that are served")
            return False
        if found.digest == self._seen and not is_asked:
            return False  # refused before
        self._seen = found.digest
        with _short_turns():
            api, changes = await asyncio.to_thread(self._check, found)
        if changes.breaking and not self._allows_breaking:
            self._tell(f"contracts refused, they would break clients; {ALLOW_BREAKING}")
            self._list(changes.breaking)
            return False
        self._serve(api)
        self._api, self._trouble = api, ""
        self._tell("contracts changed" if changes else "contracts changed, but no route of them")
        self._list(changes.lines())
        return True

    def _check(self, found: Found) -> tuple[Api, Changes]:
        forget()  # of the sets before this one, which were served once
        compile_routes(self._api.routes)
        api = self._compile(found)
        return api, changes_between(self._api.routes.routes, api.routes.routes)

    def _keep(self, trouble: str, *, is_asked: bool) -> None:
        """Say once what is wrong, and again when asked."""
        if is_asked or trouble != self._trouble:
            self._tell(f"contracts not changed: {trouble}")
        self._trouble = trouble

    def _list(self, lines: Iterable[str]) -> None:
        for number, line in enumerate(lines):
            if number == LINES_MAX:
                self._tell("…")
                return
            self._tell(line)


@contextmanager
def _short_turns() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual_s)


@asynccontextmanager
async def following(reloader: Reloader) -> AsyncIterator[None]:
    """Keep up with the contracts while inside."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(reloader.run())
        try:
            yield
        finally:
            task.cancel()
