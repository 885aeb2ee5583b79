"""`tenfold edge`: where contracts come from, what of them is served, and what is refused."""

import datetime
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from deploy.local.address import free_addresses
from tests.foreign import STRANGER, Shop, refusal, running_edge, started_edge
from tests.mesh import poll_until
from tests.protos import SITE_PACKAGES, compile_protos

OPEN = "--allow-anonymous"
NOWHERE = "127.0.0.1:1"
GUARDED = """
syntax = "proto3";
package acme.club.v1;
import "google/api/annotations.proto";
import "tenfold/options/v1/policy.proto";
service Club {
  rpc Open(Q) returns (Q) {
    option (google.api.http) = {get: "/v1/open"};
    option (tenfold.options.v1.method) = {access: ACCESS_PUBLIC};
  }
  rpc Mine(Q) returns (Q) {
    option (google.api.http) = {get: "/v1/mine"};
    option (tenfold.options.v1.method) = {access: ACCESS_USER};
  }
  rpc Silent(Q) returns (Q) { option (google.api.http) = {get: "/v1/silent"}; }
}
message Q {}
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop.compiled(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def upstream(shop: Shop) -> Iterator[str]:
    port = free_addresses(1)[0].port
    with shop.serving(port, "reflection"):
        yield f"127.0.0.1:{port}"


@pytest.fixture
def image_of(tmp_path: Path) -> Callable[[str], Path]:
    """Compiles the text of a .proto file into a descriptor set."""

    def compile_text(text: str) -> Path:
        source = tmp_path / "protos"
        source.mkdir()
        (source / "a.proto").write_text(text)
        image = tmp_path / "a.binpb"
        image.write_bytes(compile_protos(source, tmp_path).SerializeToString())
        return image

    return compile_text


# Where contracts come from
def test_what_the_server_tells_is_served_as_a_file_of_it_would_be(shop, upstream, tmp_path):
    with running_edge(tmp_path, "--reflect", "--upstream", upstream, OPEN) as edge:
        told = edge.client.get("/openapi.json").json()
        assert edge.client.get("/v1/items/tea").json()["title"] == "Tea"
    with running_edge(tmp_path, "--descriptors", shop.image, "--upstream", upstream, OPEN) as edge:
        read = edge.client.get("/openapi.json").json()
    assert told["paths"].keys() == read["paths"].keys()
    assert told["components"]["schemas"].keys() == read["components"]["schemas"].keys()


def test_a_server_that_starts_later_is_waited_for(shop, tmp_path, free_port):
    address = f"127.0.0.1:{free_port}"
    with started_edge(tmp_path, "--reflect", "--upstream", address, OPEN) as edge:
        edge.until_said(f"edge: {address} does not answer yet (")
        with shop.serving(free_port, "reflection"):
            edge.until_serving()
            assert edge.client.get("/v1/items/tea").status_code == 200


def test_one_that_stays_away_is_given_up_with_the_reason(tmp_path):
    environ = {"TENFOLD_EDGE_REFLECT_WAIT_S": "0.3"}
    said = refusal(tmp_path, ["--reflect", "--upstream", NOWHERE, OPEN], environ=environ)
    assert said.startswith(f"edge: {NOWHERE}: it did not answer for 0.3 s (")
    assert "Connection refused" in said


def test_ctrl_c_ends_the_wait_for_a_server(tmp_path):
    with started_edge(tmp_path, "--reflect", "--upstream", NOWHERE, OPEN) as edge:
        edge.until_said("does not answer yet")
        edge.interrupt()
        assert edge.exit_code() == 0
        assert "Traceback" not in edge.said


def test_a_server_without_reflection_is_told_apart_from_one_that_is_away(shop, tmp_path, free_port):
    address = f"127.0.0.1:{free_port}"
    with shop.serving(free_port):
        said = refusal(tmp_path, ["--reflect", "--upstream", address, OPEN])
    assert said == (
        f"edge: {address}: it does not serve reflection: turn that on there, or use --descriptors"
    )


def test_an_image_of_buf_build_is_a_descriptor_set(upstream, tmp_path):
    module = tmp_path / "module"
    (module / "google" / "api").mkdir(parents=True)
    shutil.copy(STRANGER / "shop.proto", module)
    for name in ("http.proto", "annotations.proto"):
        shutil.copy(Path(SITE_PACKAGES) / "google" / "api" / name, module / "google" / "api")
    image, buf = tmp_path / "shop.binpb", Path(sys.executable).with_name("buf")
    subprocess.run([buf, "build", "-o", image], cwd=module, check=True)
    with running_edge(tmp_path, "--descriptors", str(image), "--upstream", upstream, OPEN) as edge:
        assert edge.client.get("/v1/items/tea").json()["title"] == "Tea"


def test_each_package_goes_to_its_own_server(shop, upstream, tmp_path):
    upstreams = ("--upstream", f"acme.shop={upstream}", "--upstream", NOWHERE)
    with running_edge(tmp_path, "--descriptors", shop.image, *upstreams, OPEN) as edge:
        assert edge.client.get("/v1/items/tea").status_code == 200


def test_a_server_is_reached_over_tls_and_must_prove_who_it_is(shop, tmp_path, free_port):
    certificate, key = write_certificate(tmp_path)
    upstream = ("--upstream", f"127.0.0.1:{free_port}")
    tls = ("--upstream-tls", "--ca", str(certificate))
    with shop.serving(free_port, "reflection", f"cert={certificate}", f"key={key}"):
        with running_edge(tmp_path, "--reflect", *upstream, *tls, OPEN) as edge:
            assert edge.client.get("/v1/items/tea").json()["title"] == "Tea"
            assert len(edge.client.get("/v1/items:watch?count=2").text.splitlines()) == 2
            assert edge.client.get("/readyz").status_code == 200
        arguments = ("--descriptors", shop.image, *upstream, "--upstream-tls", OPEN)
        with running_edge(tmp_path, *arguments) as edge:  # which believes public authorities
            poll_until(
                lambda: edge.client.get("/v1/items/tea").status_code == 503,
                timeout_s=30,
                what="no trust",
            )
            assert edge.client.get("/readyz").status_code == 503


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "stranger")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


# What of them is served
def test_without_the_flag_nothing_is_served_that_says_nothing_of_who_may(shop, tmp_path):
    said = refusal(tmp_path, ["--descriptors", shop.image, "--upstream", NOWHERE])
    assert said.startswith("edge: nothing can be served; left out: 6 methods ")
    assert "--allow-anonymous" in said


def test_a_contract_that_carries_our_policy_is_obeyed(image_of, tmp_path):
    arguments = ("--descriptors", str(image_of(GUARDED)), "--upstream", NOWHERE)
    with running_edge(tmp_path, *arguments) as edge:
        statuses = {path: status_of(edge, path) for path in ("open", "mine", "silent")}
        assert statuses == {"open": 503, "mine": 404, "silent": 404}  # 503: nobody is behind
        assert edge.client.post("/acme.club.v1.Club/Mine", json={}).status_code == 404
        [silent, guarded] = [line for line in edge.said.splitlines() if "not served" in line]
        assert silent.endswith("(acme.club.v1.Club/Silent)")
        assert "--allow-anonymous" in silent
        assert guarded.endswith("(acme.club.v1.Club/Mine)")


def test_the_flag_opens_what_says_nothing_and_no_more(image_of, tmp_path):
    arguments = ("--descriptors", str(image_of(GUARDED)), "--upstream", NOWHERE, OPEN)
    with running_edge(tmp_path, *arguments) as edge:
        statuses = {path: status_of(edge, path) for path in ("open", "mine", "silent")}
        assert statuses == {"open": 503, "mine": 404, "silent": 503}


def status_of(edge, path: str) -> int:
    return edge.client.get(f"/v1/{path}").status_code


# What is refused
def only_last_file(image: bytes) -> bytes:
    files = FileDescriptorSet.FromString(image).file
    return FileDescriptorSet(file=files[-1:]).SerializeToString()


def without_rules(image: bytes) -> bytes:
    file_set = FileDescriptorSet.FromString(image)
    for method in file_set.file[-1].service[0].method:
        method.ClearField("options")
    return file_set.SerializeToString()


def with_a_second_service(image: bytes) -> bytes:
    file_set = FileDescriptorSet.FromString(image)
    file_set.file[-1].service.add().CopyFrom(file_set.file[-1].service[0])
    file_set.file[-1].service[-1].name = "Copy"
    return file_set.SerializeToString()


def of_edition_3000(image: bytes) -> bytes:
    file_set = FileDescriptorSet.FromString(image)
    file_set.file[-1].syntax = "editions"
    last = file_set.file.pop().SerializeToString() + b"\x70\xb8\x17"  # field 14: 3000
    length = bytes((len(last) & 0x7F | 0x80, len(last) >> 7))
    return file_set.SerializeToString() + b"\x0a" + length + last


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda image: image[: len(image) // 2], "it is no FileDescriptorSet, or only a part"),
        (lambda image: b'syntax = "proto3";', "it is no FileDescriptorSet, or only a part"),
        (lambda image: b"", "a FileDescriptorSet without any file, or none at all"),
        (only_last_file, "imports google/api/annotations.proto, which is missing: write the set"),
        (without_rules, "no method has a google.api.http rule"),
        (with_a_second_service, "these routes conflict: GET /v1/{name=items/*} (/acme.shop.v1"),
        (of_edition_3000, "shop.proto is of an unknown edition, number 3000"),
    ],
    ids=["truncated", "text", "empty", "imports", "no rules", "conflict", "edition"],
)
def test_a_file_that_cannot_be_served_ends_it_before_it_listens(shop, tmp_path, spoil, reason):
    image = tmp_path / "spoilt.binpb"
    image.write_bytes(spoil(Path(shop.image).read_bytes()))
    said = refusal(tmp_path, ["--descriptors", str(image), "--upstream", NOWHERE, OPEN])
    assert reason in said


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--upstream", NOWHERE], "either --descriptors FILE, or --reflect"),
        (["--upstream", NOWHERE, "--reflect", "--descriptors", "a"], "either --descriptors FILE"),
        (["--upstream", "nowhere", "--reflect"], "--upstream is 'nowhere': it must be HOST:PORT"),
        (["--upstream", NOWHERE, "--upstream", NOWHERE, "--reflect"], "given twice for '*'"),
        (["--upstream", NOWHERE, "--reflect", "--ca", "a"], "only with --upstream-tls"),
        (["--upstream", NOWHERE, "--descriptors", "missing"], "missing cannot be read: No such"),
        (
            ["--upstream", NOWHERE, "--reflect", "--upstream-tls", "--ca", "missing"],
            "missing: No such file or directory",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_sentence_that_names_it(tmp_path, arguments, reason):
    assert reason in refusal(tmp_path, arguments)


def test_a_package_that_no_server_is_named_for_is_refused(shop, tmp_path):
    arguments = ["--descriptors", shop.image, "--upstream", f"acme.bank={NOWHERE}", OPEN]
    assert "no --upstream" in refusal(tmp_path, arguments)


def test_a_file_of_no_authorities_is_refused_and_not_taken_for_the_public_ones(shop, tmp_path):
    (tmp_path / "empty.pem").write_text("")
    arguments = ["--descriptors", shop.image, "--upstream", NOWHERE, OPEN]
    said = refusal(tmp_path, [*arguments, "--upstream-tls", "--ca", "empty.pem"])
    assert "empty.pem: it holds no certificate in PEM" in said


def test_the_help_shows_a_whole_command() -> None:
    command = [sys.executable, "-m", "deploy.cli", "edge", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tenfold edge --reflect --upstream 127.0.0.1:50051 --allow-anonymous" in shown
