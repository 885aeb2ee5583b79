import pytest

from services.notification.config import NotificationConfig
from services.notification.wiring import PREFIX, mail_server_of, sender_of
from shared.config import ConfigError, load, settings


def config(**environ: str) -> NotificationConfig:
    return load(NotificationConfig, PREFIX, {PREFIX + name: text for name, text in environ.items()})


def test_the_defaults_work():
    assert mail_server_of(config()).host == "127.0.0.1"
    assert sender_of(config()).domain == "localhost.localdomain"


@pytest.mark.parametrize(
    "value", ["mail.example.com", "smtp://ada:secret@mail.example.com?tls=none"]
)
def test_a_wrong_url_is_refused_by_name_without_its_password(value):
    with pytest.raises(ConfigError, match="TENFOLD_NOTIFICATION_SMTP_URL") as caught:
        mail_server_of(config(SMTP_URL=value))
    assert "secret" not in str(caught.value)


def test_a_missing_file_of_authorities_is_refused_by_name():
    with pytest.raises(ConfigError, match="TENFOLD_NOTIFICATION_SMTP_CA_FILE"):
        mail_server_of(config(SMTP_CA_FILE="/nowhere.pem"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("MAIL_FROM", "Tenfold <tenfold@example.com>"), ("MAIL_FROM_NAME", "Ten\r\nBcc: eve@x.org")],
)
def test_a_sender_that_would_break_a_header_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"TENFOLD_NOTIFICATION_{name}"):
        sender_of(config(**{name: value}))


@pytest.mark.parametrize("name", ["SMTP_REPLY_TIMEOUT_S", "SENDER_POLL_S", "WATCH_POLL_S"])
def test_a_time_that_cannot_be_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=name):
        config(**{name: "0"})


def test_the_url_is_never_shown():
    shown = {entry.variable: entry.value for entry in settings(config(), PREFIX)}
    assert shown["TENFOLD_NOTIFICATION_SMTP_URL"] == "********"
