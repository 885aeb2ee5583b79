"""One shard of the cluster on this machine: a Postgres primary, its standbys, and the watcher.

A primary that dies is replaced by a standby, if one surely has all that was acknowledged, and is
made a standby of its successor. It could be started again instead, which loses nothing either, and
is what happens where no standby is fit. We promote where we can, because a promotion takes as long
with a large log as with a small one, crash recovery does not; because what kills a server (a full
disk, a damaged file, a freeze) often meets it again; and because it is what production does, so
what cannot bear it is found here. A server that is silent, but lives, is killed first.

The order that makes it safe: the old server's processes are ended and its data folder renamed,
durably, before another is promoted. Wherever we end, the folders tell the next start who is the
primary: the one that is no standby; if there is none, the one that was renamed last, since nobody
was promoted after it. See standing.py for who is fit.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from deploy.local import postgres
from deploy.local.address import Address
from deploy.local.errors import LaunchError
from deploy.local.program import Program
from deploy.local.standing import (
    Role,
    Standing,
    heir_of,
    names_of,
    primary_of,
    read_standing,
    to_wait_for,
    write_standing,
)
from deploy.local.supervisor import Supervisor
from shared.db.errors import DatabaseRefused
from shared.db.postgres_connection import ERRORS, Server
from shared.db.postgres_promotion import (
    Host,
    PromotionRefused,
    ask_hosts,
    choose_host,
    promote_host,
)

STANDING_FILE = "standing.json"
WATCH_S = 0.25
PROBE_S = 1.0
# So many unanswered probes in a row, each of PROBE_TIMEOUT_S, are the end of a server.
SILENT_PROBES_MAX = 3
# How long a dead primary's standbys are asked before it is started again in their place.
HEIR_S_MAX = 5.0
RETRY_S = 1.0
# A standby that runs for so long and follows nobody is made anew.
LOST_S_MAX = 30.0
SYNCHRONOUS_S_MAX = 10.0

_FOLLOWERS = """
SELECT application_name AS node, flush_lsn >= $1::text::pg_lsn AS has_it FROM pg_stat_replication
WHERE state = 'streaming' AND reply_time > clock_timestamp() - interval '3 s'
"""

Say = Callable[[str], None]


class Shard:
    """One shard. Blocking when made: it finds out from the folders who is the primary.

    Args:
        index: which; data knows its shard by it.
        site: its place and passwords.
        nodes: node -> where it listens.
        say: tells the operator one line.
        on_promoted: called, with the index, when there is a new primary.
        is_synchronous: whether commits wait for a standby, without which none is promoted.

    Attributes:
        primary: the node that takes writes.

    Raises:
        LaunchError: the folders do not tell who is the primary.
    """

    def __init__(
        self,
        index: int,
        site: postgres.Site,
        nodes: Mapping[str, Address],
        *,
        say: Say,
        on_promoted: Callable[[int], Awaitable[None]],
        is_synchronous: bool = True,
    ) -> None:
        self.index = index
        self.site = site
        self.nodes = nodes
        self._tell = say
        self._on_promoted = on_promoted
        self._is_synchronous = is_synchronous
        self._file = site.folder / STANDING_FILE
        last = read_standing(self._file)
        try:
            self.primary = primary_of({node: self._role_of(node) for node in nodes}, last.primary)
        except LaunchError as error:
            raise LaunchError(f"Shard {index} in {site.folder}: {error}.") from error
        if self._role_of(self.primary) is Role.FENCED:
            postgres.take_back(site, self.primary)
        self._standing = last if last.primary == self.primary else Standing(self.primary)
        # What the primary's settings ask for: it may be more than is known to be obeyed.
        self._asked_for = self.promotable
        self._followed_s = dict.fromkeys(nodes, time.monotonic())
        self._to_make_anew: set[str] = set()
        self._is_replacing = False
        self._is_waited_for = asyncio.Event()

    @property
    def standbys(self) -> Sequence[str]:
        """The nodes that are not the primary."""
        return [node for node in self.nodes if node != self.primary]

    @property
    def promotable(self) -> frozenset[str]:
        """Who may be promoted now; see Standing."""
        return self._standing.promotable

    def dsn(self, database: str) -> str:
        """How a service reaches it: every host, since the primary may become another."""
        first, hosts = next(iter(self.nodes.values())), ",".join(map(str, self.nodes.values()))
        return self.site.dsn(first, database).replace(str(first), hosts)

    async def start(self, supervisor: Supervisor, databases: Sequence[str]) -> None:
        """Start every node and the watcher; return when commits wait for standbys, if they shall.

        Raises:
            LaunchError: a server cannot be made or started.
        """
        for node in self.nodes:  # a launcher that was killed leaves backends behind for a moment
            await asyncio.to_thread(self._end, node)
        await asyncio.to_thread(postgres.make_primary, self.site, self.primary)
        await supervisor.start(self._program(self.primary))
        await postgres.ensure_databases(
            self.site, self.nodes[self.primary], databases, replicas=self.standbys
        )
        for node in self.standbys:
            await asyncio.to_thread(self._make_replica, node)
        await supervisor.start(*(self._program(node) for node in self.standbys))
        for node in self.nodes:
            supervisor.run_beside(self._watch_for_silence(supervisor, node))
        supervisor.run_beside(self._watch_standbys())
        if self._is_synchronous and self.standbys:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_waited_for.wait(), SYNCHRONOUS_S_MAX)

    def _say(self, text: str) -> None:
        self._tell(f"shard {self.index}: {text}")

    # Programs --------------------------------------------------------------------------------

    def _program(self, node: str) -> Program:
        async def successor() -> Program:
            return await self._after_death(node)

        return postgres.postgres_program(
            self.site,
            self.nodes[node],
            node=node,
            name=name_of(self.index, node),
            successor=successor,
            **self._settings(node),
        )

    def _settings(self, node: str) -> Any:  # noqa: ANN401 - keyword arguments
        if self.site.is_replica(node):
            return {"source": self.nodes[self.primary]}
        return {"synchronous": self._asked_for} if node == self.primary else {}

    async def _reload(self, node: str) -> None:
        postgres.write_settings(self.site, self.nodes[node], node=node, **self._settings(node))
        async with postgres.open_admin(self.site, self.nodes[node]) as admin:
            await admin.execute("SELECT pg_reload_conf()")

    def _role_of(self, node: str) -> Role:
        if self.site.data_of(node).exists():
            return Role.STANDBY if self.site.is_replica(node) else Role.PRIMARY
        return Role.FENCED if self.site.fenced_of(node).exists() else Role.ABSENT

    # After a death ---------------------------------------------------------------------------

    async def _after_death(self, node: str) -> Program:
        """What is started in its place: as before, or a standby of whoever was promoted."""
        await asyncio.to_thread(self._end, node)
        if node == self.primary:
            await self._replace_primary()
        elif node in self._to_make_anew and self._role_of(node) is Role.STANDBY:
            await asyncio.to_thread(postgres.fence, self.site, node)
            await self._ensure_replica(node)
        self._to_make_anew.discard(node)
        self._followed_s[node] = time.monotonic()
        return self._program(node)

    def _end(self, node: str) -> None:
        postgres.end_server(self.site, node)
        postgres.drop_stale_lock(self.site, node)

    async def _replace_primary(self) -> None:
        """Promote a standby that is fit, and make the dead primary one; if none is, do nothing."""
        died_s, dead = time.monotonic(), self.primary
        self._is_replacing = True
        try:
            heir = await self._find_heir()
            if heir is not None:
                await asyncio.to_thread(postgres.fence, self.site, dead)
                is_rewindable = await self._promote(heir)
                self.primary = heir
                self._remember(frozenset())
        finally:
            self._is_replacing = False
        # The settings that it starts, or was started, with ask for no more.
        self._asked_for = self.promotable
        self._followed_s = dict.fromkeys(self.nodes, time.monotonic())
        if heir is None:
            if self.standbys:
                self._say(f"no standby surely has all of {dead}, which is started again")
            return
        self._say(f"{heir} is the primary, {time.monotonic() - died_s:.1f} s after {dead} died")
        await asyncio.gather(
            self._on_promoted(self.index),
            self._lead_others(),
            self._ensure_replica(dead, is_rewindable=is_rewindable),
        )

    async def _find_heir(self) -> str | None:
        if not self.promotable:
            return None
        deadline_s = time.monotonic() + HEIR_S_MAX
        while time.monotonic() < deadline_s:
            told = await self._ask(self.promotable)
            if heir := heir_of(self.promotable, told):
                return heir
            await asyncio.sleep(WATCH_S)
        return None

    async def _ask(self, nodes: frozenset[str]) -> Mapping[str, Host]:
        places = {self.site.admin_dsn(self.nodes[node]): node for node in nodes}
        answers = await ask_hosts(self._server(*places))
        return {places[host.server.dsn]: host for host in answers if host.is_replica}

    def _server(self, *dsns: str) -> Server:
        return Server(dsns[0], f"shard {self.index}", "tenfold-launcher", dsns)

    async def _promote(self, heir: str) -> bool:
        """Return when it is the primary; False if that was not of our doing.

        The dead one is fenced by now, so there is no way back but a start of everything.
        """
        server, said = self._server(self.site.admin_dsn(self.nodes[heir])), ""
        while True:
            try:
                answers = await ask_hosts(server)
                if answers and not answers[0].is_replica:
                    return False
                await promote_host(choose_host(server.name, answers).server)
                return True
            except (PromotionRefused, DatabaseRefused) as error:
                if str(error) != said:
                    said = str(error)
                    self._say(f"{heir} is not the primary yet: {said}")
                await asyncio.sleep(WATCH_S)

    async def _lead_others(self) -> None:
        """Let standbys follow the new primary; one that is down will, from its start on."""
        for node in self.standbys:
            if self._role_of(node) is Role.STANDBY:
                with suppress(*ERRORS):
                    await self._reload(node)

    async def _ensure_replica(self, node: str, *, is_rewindable: bool = False) -> None:
        """Make the node's data a standby's, as soon as the primary lets it."""
        said = ""
        while self._role_of(node) not in (Role.STANDBY, Role.PRIMARY):
            try:
                await self._make_replica_again(node, is_rewindable=is_rewindable)
            except (LaunchError, *ERRORS) as error:
                if str(error) != said:
                    said = str(error)
                    self._say(f"{node} cannot be made a standby yet: {said}")
                await asyncio.sleep(RETRY_S)

    async def _make_replica_again(self, node: str, *, is_rewindable: bool) -> None:
        address = self.nodes[self.primary]
        await postgres.ensure_databases(self.site, address, (), replicas=self.standbys)
        async with postgres.open_admin(self.site, address) as admin:
            await admin.execute("CHECKPOINT")  # pg_rewind reads the timeline from it
        how = "rewound"
        fenced = self.site.fenced_of(node)
        if not (
            is_rewindable
            and fenced.exists()
            and await asyncio.to_thread(postgres.rewind, self.site, node, address)
        ):
            how = "copied anew"
            await asyncio.to_thread(self._make_replica, node)
        self._say(f"{node} is a standby of {self.primary}, {how}")

    def _make_replica(self, node: str) -> None:
        postgres.make_replica(self.site, node, self.nodes[self.primary])
        postgres.forget_fenced(self.site, node)

    # The watcher -----------------------------------------------------------------------------

    async def _watch_for_silence(self, supervisor: Supervisor, node: str) -> None:
        """Kill a node that runs and answers nobody: its death is then dealt with as any."""
        is_alive, silent = postgres.is_alive(self.nodes[node]), 0
        while True:
            await asyncio.sleep(PROBE_S)
            child = supervisor.children[name_of(self.index, node)]
            process = child.process
            silent = 0 if await is_alive() or not child.is_ready else silent + 1
            if silent >= SILENT_PROBES_MAX and child.process is process:
                self._say(f"{node} answers nobody and is killed")
                silent = 0
                await asyncio.to_thread(postgres.end_server, self.site, node)

    async def _watch_standbys(self) -> None:
        """Let commits wait for the standbys that follow, and for no other."""
        while True:
            with suppress(*ERRORS):
                primary = self.primary
                async with postgres.open_admin(self.site, self.nodes[primary]) as admin:
                    while self.primary == primary:
                        await self._look(admin)
                        await asyncio.sleep(WATCH_S)
            await asyncio.sleep(WATCH_S)

    async def _look(self, admin: Any) -> None:  # noqa: ANN401 - asyncpg is untyped
        followers = await self._followers(admin)
        now_s = time.monotonic()
        self._followed_s |= dict.fromkeys(followers, now_s)
        away_s = {node: now_s - self._followed_s[node] for node in self.standbys}
        wanted = to_wait_for(self.promotable, away_s) if self._is_synchronous else frozenset()
        if self._is_replacing:
            return
        if not wanted == self.promotable == self._asked_for:
            await self._wait_for(admin, wanted)
        if self.promotable:
            self._is_waited_for.set()
        for node, seconds in away_s.items():
            if seconds > LOST_S_MAX and self._role_of(node) is Role.STANDBY:
                self._say(f"{node} cannot follow {self.primary} any more and is made anew")
                self._to_make_anew.add(node)
                self._followed_s[node] = now_s
                await asyncio.to_thread(postgres.end_server, self.site, node)

    async def _followers(self, admin: Any, lsn: str = "0/0") -> frozenset[str]:  # noqa: ANN401
        """The standbys that stream now and have the log on disk so far."""
        rows = await admin.fetch(_FOLLOWERS, lsn)
        return frozenset(row["node"] for row in rows if row["has_it"]) & set(self.standbys)

    async def _wait_for(self, admin: Any, wanted: frozenset[str]) -> None:  # noqa: ANN401
        """Change for whom commits wait; see standing.py for the order."""
        primary, before = self.primary, self.promotable
        # With whom it is acknowledged from now on may be any of both.
        self._remember(before | wanted if before and wanted else frozenset())
        if not wanted:
            self._say(f"commits are on {primary} alone; no standby may be promoted")
        self._asked_for = wanted
        address = self.nodes[primary]
        postgres.write_settings(self.site, address, node=primary, synchronous=wanted)
        await admin.execute("SELECT pg_reload_conf()")
        if wanted:
            lsn = await self._obeyed_since(wanted)
            while not wanted <= await self._followers(admin, lsn):
                if not wanted <= await self._followers(admin):
                    return  # one has gone meanwhile; we will look again
                await asyncio.sleep(WATCH_S / 10)
        if self._is_replacing or self.primary != primary:
            return
        self._remember(wanted)
        if wanted - before:
            self._say(f"commits are on {names_of([primary, *wanted])}")

    async def _obeyed_since(self, wanted: frozenset[str]) -> str:
        """The end of the log when every commit has begun to wait for them.

        A new connection has the new setting when the server has told it to all of its processes.
        It is the checkpointer that makes commits wait; a checkpoint that begins after it was told
        begins after it has obeyed.
        """
        address = self.nodes[self.primary]
        while True:
            async with postgres.open_admin(self.site, address) as admin:
                names = await admin.fetchval("SHOW synchronous_standby_names")
                if names == postgres.synchronous_names(wanted):
                    await admin.execute("CHECKPOINT")
                    return str(await admin.fetchval("SELECT pg_current_wal_flush_lsn()::text"))
            await asyncio.sleep(WATCH_S / 10)

    def _remember(self, promotable: frozenset[str]) -> None:
        self._standing = Standing(self.primary, promotable)
        write_standing(self._file, self._standing)


def name_of(index: int, node: str) -> str:
    """What the supervisor calls a node of a shard."""
    return f"postgres-{index}-{node}"
