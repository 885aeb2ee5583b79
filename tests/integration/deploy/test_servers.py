"""The servers from wheels, started as the launcher starts them."""

from pathlib import Path

import aiosmtplib
import nats
import pytest
import redis.asyncio
import redis.exceptions

from deploy.local.address import Address
from deploy.local.program import answers


async def test_nats_keeps_streams_on_disk_and_refuses_strangers(nats_url: str) -> None:
    client = await nats.connect(nats_url)
    stream = await client.jetstream().add_stream(name="servers", subjects=["servers.>"])
    assert stream.config.storage == "file"
    await client.jetstream().delete_stream("servers")
    await client.close()
    address = Address.parse(nats_url.rpartition("@")[2], setting="nats_url")
    stranger = answers(address, send=b"CONNECT {}\r\nPING\r\n", expect=b"Authorization Violation")
    assert await stranger()


async def test_valkey_answers_and_refuses_strangers(valkey_url: str) -> None:
    async with redis.asyncio.from_url(valkey_url) as client:
        assert await client.ping()
        assert await client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}
    async with redis.asyncio.from_url("redis://" + valkey_url.rpartition("@")[2]) as stranger:
        with pytest.raises(redis.exceptions.AuthenticationError):
            await stranger.ping()


async def test_a_mail_becomes_one_file(mail_sink: tuple[str, Path]) -> None:
    address, folder = mail_sink
    host, _, port = address.rpartition(":")
    await aiosmtplib.send(
        b"Subject: hello\r\n\r\nBody \xc3\xa9\r\n",
        sender="from@example.com",
        recipients=["to@example.com"],
        hostname=host,
        port=int(port),
    )
    [mail] = [path.read_bytes() for path in folder.glob("*.eml") if b"hello" in path.read_bytes()]
    assert b"X-Envelope-To: to@example.com\r\n" in mail
    assert b"Body \xc3\xa9" in mail
