"""shop.proto as the sides need it: generated modules, and a descriptor set of any size."""

import subprocess
import sys
import sysconfig
from pathlib import Path

from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import (
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)
from tenfold.options.v1 import policy_pb2

from tests.bench.sides.children import ROOT

HERE = Path(__file__).resolve().parent
SERVICE = "shop.v1.OrderService"
_SET = "shop.binpb"


def compile_contract(folder: Path) -> Path:
    """Run protoc; the folder then holds shop_pb2.py, shop_pb2_grpc.py and the returned set."""
    packages = Path(sysconfig.get_paths()["purelib"])
    roots = (HERE, ROOT / "proto", packages, packages / "grpc_tools" / "_proto")
    outputs = ("--python_out", "--grpc_python_out")
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *(f"-I{root}" for root in roots)]
        + [f"{output}={folder}" for output in outputs]
        + [f"--descriptor_set_out={folder / _SET}", "--include_imports", "shop.proto"],
        check=True,
    )
    return folder / _SET


def strangers(descriptors: Path, route_count: int = 2) -> Path:
    """The same contract as a stranger would have it, without our options, and of any size.

    Args:
        descriptors: from `compile_contract`; the new set is written beside it.
        route_count: at least the two of shop.proto; the others take the same messages.
    """
    files = FileDescriptorSet.FromString(descriptors.read_bytes())
    shop = next(file for file in files.file if file.package == "shop.v1")
    for method in shop.service[0].method:
        method.options.ClearExtension(policy_pb2.method)
    _add_routes(shop, route_count)
    path = descriptors.with_name(f"shop-{route_count}.binpb")
    path.write_bytes(files.SerializeToString())
    return path


def _add_routes(shop: FileDescriptorProto, route_count: int) -> None:
    service = shop.service[0]
    own = list(service.method)
    others = [_other(own[0], number) for number in range(route_count - len(own))]
    middle = len(others) // 2
    del service.method[:]
    service.method.extend([*others[:middle], *own, *others[middle:]])


def _other(get: MethodDescriptorProto, number: int) -> MethodDescriptorProto:
    """As in real contracts: collections beside each other, and others below the same shop."""
    method = MethodDescriptorProto()
    method.CopyFrom(get)
    method.name = f"Get{number}"
    parent = f"depots{number}/*/orders" if number % 2 else f"shops/*/returns{number}"
    method.options.Extensions[annotations_pb2.http].get = f"/v1/{{name={parent}/*}}"
    return method
