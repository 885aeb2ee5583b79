"""Import directions that `lint-imports` cannot say: the standard library, and who may be lazy."""

import ast
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = sorted((ROOT / "services").glob("*/domain.py"))
# The domain decides; waiting, talking and storing are for others.
WAITING = {"asyncio", "concurrent", "multiprocessing", "selectors", "socket", "ssl", "subprocess"}
WAITING |= {"sqlite3", "threading"}
ALLOWED_OF_OURS = {"shared.errors", "shared.clock"}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide directions"
            yield node.module or ""


def impurities(path: Path) -> list[str]:
    """What a domain, or a table it reads from beside it, imports and may not."""
    own, found = ".".join(path.relative_to(ROOT).parent.parts) + ".", []
    for module in imports_of(path):
        top = module.partition(".")[0]
        if module.startswith(own):
            found += impurities(path.with_name(f"{module.removeprefix(own)}.py"))
        elif module not in ALLOWED_OF_OURS and (
            top not in sys.stdlib_module_names or top in WAITING
        ):
            found.append(module)
    return found


@pytest.mark.parametrize("path", DOMAINS, ids=lambda path: path.parent.name)
def test_a_domain_imports_the_standard_library_and_our_errors_alone(path: Path) -> None:
    assert impurities(path) == []


@pytest.mark.parametrize("path", DOMAINS, ids=lambda path: path.parent.name)
def test_a_domain_never_waits(path: Path) -> None:
    waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, waiting)] == []


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    command = [str(program), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def test_every_import_direction_holds() -> None:
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout


FORBIDDEN = {
    "a domain uses its store": ("services/notification/domain.py", "services.notification.store"),
    "a store uses its handler": ("services/notification/store.py", "services.notification.handler"),
    "a service uses another": ("services/notification/handler.py", "services.media.domain"),
    "shared uses a service": ("shared/clock.py", "services.media"),
    "the edge uses a service": ("edge/routes.py", "services.media.domain"),
    "the launcher loads gRPC": ("deploy/local/supervisor.py", "grpc"),
    "the launcher loads gRPC by way of shared": ("deploy/cli.py", "shared.lifecycle"),
}


@pytest.mark.parametrize(("file", "module"), FORBIDDEN.values(), ids=FORBIDDEN)
def test_a_wrong_direction_is_found(tmp_path: Path, file: str, module: str) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    for package in ("shared", "services", "edge", "deploy"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\nimport {module}\n")
    run = lint_imports(tmp_path)
    assert run.returncode == 1, run.stdout
    assert module in run.stdout


def test_deploy_imports_shared_and_the_contracts_alone() -> None:
    foreign = {"services", "edge", "grpc", "tests"}
    for path in (ROOT / "deploy").rglob("*.py"):
        assert not foreign & {module.partition(".")[0] for module in imports_of(path)}, path


def test_an_edge_loads_what_only_a_mesh_needs_when_it_is_one() -> None:
    """Its start is waited for: databases, brokers and field rules would double it."""
    show = "import sys, edge.__main__; print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in shown.stdout.split()}
    needless = {"redis", "nats", "protovalidate", "aiosqlite", "asyncpg", "argon2", "uvicorn"}
    assert loaded & needless == set()
    assert not {"edge.mesh", "edge.reflection"} & set(shown.stdout.split())
