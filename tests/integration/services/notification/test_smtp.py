import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from services.notification.domain import Reply
from services.notification.smtp import MailServer, MailServerUnavailable, TlsPolicy, open_smtp

from .conftest import Mailbox, dropping_mail, serving_mail

MESSAGE = b"Subject: hello\r\n\r\n.dotted\r\nbody\r\n"


def connect(
    port: int, query: str = "", ca_file: str = "", scheme: str = "smtp", reply_s: float = 5
):
    server = MailServer.parse(f"{scheme}://localhost:{port}{query}", ca_file=ca_file)
    return open_smtp(server, local_name="example.com", connect_timeout_s=5, reply_timeout_s=reply_s)


async def send(connection, recipient: str = "ada@example.org"):
    return await connection.send("tenfold@example.com", recipient, MESSAGE)


async def test_a_message_arrives_byte_for_byte(mailbox):
    async with connect(mailbox.port) as connection:
        outcome = await send(connection)
    assert outcome.reply is Reply.ACCEPTED
    assert mailbox.contents == [MESSAGE]
    assert mailbox.mails[0].mail_from == "tenfold@example.com"
    assert mailbox.mails[0].rcpt_tos == ["ada@example.org"]


async def test_one_connection_carries_a_batch_with_a_reset_before_each(mailbox):
    async with connect(mailbox.port) as connection:
        for _ in range(3):
            await connection.prepare()
            await send(connection)
    assert len(mailbox.mails) == 3
    assert mailbox.resets == 3


@pytest.mark.parametrize("command", ["RCPT", "DATA"])
@pytest.mark.parametrize(
    ("answer", "reply"), [("451 busy", Reply.DEFERRED), ("550 no such user", Reply.REFUSED)]
)
async def test_an_answer_decides_and_the_next_message_still_goes(mailbox, command, answer, reply):
    mailbox.answers[command] = [answer]
    async with connect(mailbox.port) as connection:
        outcome = await send(connection)
        assert (outcome.reply, outcome.reason) == (reply, answer)
        await connection.prepare()
        assert (await send(connection)).reply is Reply.ACCEPTED
    assert len(mailbox.mails) == 1


async def test_a_server_that_closes_with_421_ends_the_connection(mailbox):
    mailbox.answers["RCPT"] = ["421 closing"]
    async with connect(mailbox.port) as connection:
        assert (await send(connection)).reply is Reply.DEFERRED
        with pytest.raises(MailServerUnavailable):
            await connection.prepare()


@pytest.mark.parametrize("hang", [False, True], ids=["dropped", "silent"])
@pytest.mark.parametrize(
    ("drop_at", "reply"),
    [("RCPT", Reply.DEFERRED), ("DATA", Reply.DEFERRED), ("END", Reply.LOST)],
)
async def test_only_a_loss_after_the_text_leaves_the_outcome_unknown(drop_at, reply, hang):
    async with (
        dropping_mail(drop_at=drop_at.replace("END", "end"), hang=hang) as server,
        connect(server.port, reply_s=0.3) as connection,
    ):
        outcome = await send(connection)
        assert outcome.reply is reply
        assert outcome.reason
        with pytest.raises(MailServerUnavailable):
            await connection.prepare()
    assert len(server.messages) == (drop_at == "END")


async def test_a_server_that_is_down_is_unavailable(closed_port):
    with pytest.raises(MailServerUnavailable):
        async with connect(closed_port):
            pass


async def test_a_server_that_never_greets_is_given_up_in_time():
    async with dropping_mail(drop_at="greeting", hang=True) as server:
        with pytest.raises(MailServerUnavailable):
            async with connect(server.port, reply_s=0.2):
                pass


async def test_without_the_tls_that_is_required_nothing_is_sent(mailbox):
    with pytest.raises(MailServerUnavailable):
        async with connect(mailbox.port, "?tls=required") as connection:
            await send(connection)
    assert mailbox.mails == []


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> str:
    """A self-signed certificate for localhost, key in the same PEM file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return str(path)


def server_context(certificate: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.mark.parametrize("query", ["?tls=required", "?tls=opportunistic"])
async def test_mail_is_encrypted_where_the_server_can(certificate, query):
    options = {"tls_context": server_context(certificate), "require_starttls": True}
    async with (
        serving_mail(Mailbox(), **options) as mailbox,
        connect(mailbox.port, query, ca_file=certificate) as connection,
    ):
        assert (await send(connection)).reply is Reply.ACCEPTED
    assert len(mailbox.mails) == 1


async def test_a_certificate_that_does_not_verify_stops_mail_that_requires_tls(certificate):
    options = {"tls_context": server_context(certificate)}
    async with serving_mail(Mailbox(), **options) as mailbox:
        with pytest.raises(MailServerUnavailable):
            async with connect(mailbox.port, "?tls=required") as connection:
                await send(connection)
    assert mailbox.mails == []


@pytest.mark.parametrize(
    ("url", "tls"),
    [
        ("smtp://127.0.0.1:2525", TlsPolicy.NONE),
        ("smtp://mail.example.com", TlsPolicy.REQUIRED),
        ("smtp://mail.example.com?tls=none", TlsPolicy.NONE),
        ("smtp://127.0.0.1?tls=required", TlsPolicy.REQUIRED),
        ("smtps://mail.example.com", TlsPolicy.IMPLICIT),
    ],
)
def test_a_url_says_whether_mail_is_encrypted(url, tls):
    assert MailServer.parse(url).tls is tls


def test_a_url_carries_a_log_in_that_is_never_printed():
    server = MailServer.parse("smtps://ada%40example.com:p%2Fw@mail.example.com:4650")
    assert (server.username, server.password, server.port) == ("ada@example.com", "p/w", 4650)
    assert "p/w" not in repr(server)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mail.example.com",
        "http://mail.example.com",
        "smtp://",
        "smtp://mail.example.com/path",
        "smtp://mail.example.com?tls=maybe",
        "smtp://mail.example.com?x=1",
        "smtps://mail.example.com?tls=none",
        "smtp://ada:pw@mail.example.com?tls=none",
        "smtp://ada:pw@mail.example.com?tls=opportunistic",
        "smtp://mail.example.com:99999",
    ],
)
def test_a_url_that_cannot_work_is_refused(url):
    with pytest.raises(ValueError, match=r"must|only|takes|range|Port"):
        MailServer.parse(url)
