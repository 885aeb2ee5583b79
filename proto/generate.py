"""Rebuilds proto/gen from the contracts; with --check, fails if it is stale.

Everything comes from pinned packages and needs no network: protoc and the gRPC
plug-in from grpcio-tools, google/api from googleapis-common-protos, and
buf/validate from the file descriptor that protovalidate carries.
"""

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    timestamp_pb2,
)

PROTO_FOLDER = Path(__file__).resolve().parent
GEN_FOLDER = PROTO_FOLDER / "gen"
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
WELL_KNOWN_FOLDER = SITE_PACKAGES / "grpc_tools" / "_proto"
VALIDATE_PROTO = "buf/validate/validate.proto"


def validate_descriptors() -> descriptor_pb2.FileDescriptorSet:
    """The file descriptor of buf/validate/validate.proto with what it imports."""
    from protovalidate._gen.buf.validate import validate_pb

    files = [duration_pb2, field_mask_pb2, timestamp_pb2]
    descriptors = descriptor_pb2.FileDescriptorSet()
    pool = descriptor_pool.Default()
    for name in ["google/protobuf/descriptor.proto", *(file.DESCRIPTOR.name for file in files)]:
        pool.FindFileByName(name).CopyToProto(descriptors.file.add())
    descriptors.file.add().ParseFromString(bytes(validate_pb.desc().proto.to_binary()))
    return descriptors


def contract_files() -> list[str]:
    """Every contract, relative to proto/, sorted."""
    found = (PROTO_FOLDER / "tenfold").rglob("*.proto")
    return sorted(str(path.relative_to(PROTO_FOLDER)) for path in found)


def run_protoc(descriptor_set: Path, *arguments: str) -> None:
    """Run protoc over the contracts; raises CalledProcessError with its words on stderr."""
    command = [sys.executable, "-m", "grpc_tools.protoc"]
    command += [f"--descriptor_set_in={descriptor_set}"]
    command += [f"-I{PROTO_FOLDER}", f"-I{SITE_PACKAGES}", f"-I{WELL_KNOWN_FOLDER}"]
    # protoc looks for its plug-ins on the path; the environment need not be activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    subprocess.run([*command, *arguments], check=True, env={**os.environ, "PATH": path})


def generate(target: Path) -> None:
    """Write stubs, type stubs and the contract image into target."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        descriptor_set = Path(scratch) / "validate.binpb"
        descriptor_set.write_bytes(validate_descriptors().SerializeToString(deterministic=True))
        out = [f"--python_out={target}", f"--mypy_out=quiet:{target}"]
        run_protoc(descriptor_set, *out, VALIDATE_PROTO)
        out += [f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}"]
        run_protoc(descriptor_set, *out, *contract_files())
        image = [f"--descriptor_set_out={target / 'tenfold' / 'contracts.binpb'}"]
        run_protoc(
            descriptor_set, *image, "--include_imports", "--include_source_info", *contract_files()
        )
    drop_empty_grpc_stubs(target)


def drop_empty_grpc_stubs(target: Path) -> None:
    """Remove the gRPC modules of files that declare no service: they hold nothing."""
    for module in target.rglob("*_pb2_grpc.py"):
        if "class " not in module.read_text():
            module.unlink()
            module.with_suffix(".pyi").unlink(missing_ok=True)


def differing(left: Path, right: Path) -> Iterator[str]:
    """Files that one side lacks or that differ, relative to the folder."""
    names = {
        p.relative_to(left) for p in left.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    names |= {
        p.relative_to(right)
        for p in right.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    for name in sorted(names):
        both = (left / name).is_file() and (right / name).is_file()
        if not both or not filecmp.cmp(left / name, right / name, shallow=False):
            yield str(name)


def main() -> int:
    """Regenerate, or with --check compare; 0 when gen/ is fresh afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if proto/gen is stale"
    )
    check_only = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "gen"
        generate(fresh)
        stale = list(differing(fresh, GEN_FOLDER)) if GEN_FOLDER.is_dir() else ["proto/gen"]
        if check_only:
            for name in stale:
                print(
                    f"proto/gen/{name} is stale: run 'make stubs' and commit the result",
                    file=sys.stderr,
                )
            return 1 if stale else 0
        if stale:
            shutil.rmtree(GEN_FOLDER, ignore_errors=True)
            shutil.copytree(fresh, GEN_FOLDER)
    print(f"proto/gen: {len(stale)} files changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
