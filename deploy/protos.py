"""Generates the gRPC stubs and checks the protocol: ``python -m deploy.protos generate|lint|breaking|check``.

The stubs are committed, so that installing needs no generator; `check` fails when they are not what the .proto files
give. buf and the generator come with the `test` extra; nothing here uses the network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def sources(root: Path = ROOT) -> list[str]:
    """Every .proto file, relative to the root that they import each other from."""
    return sorted(str(path.relative_to(root)) for path in (root / "protos").rglob("*.proto"))


def stubs(root: Path) -> dict[str, bytes]:
    """The generated files below `root` by their relative path."""
    found = [path for pattern in GENERATED for path in (root / "protos").rglob(pattern)]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def generate(out: Path, root: Path = ROOT) -> None:
    """Writes the stubs of all .proto files below `out`; raises CalledProcessError with the generator's words."""
    flags = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *flags, *sources(root)], root)


def stale(root: Path = ROOT) -> list[str]:
    """The stubs that differ from what the .proto files give, missing and left-over ones included."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), root)
        fresh, held = stubs(Path(folder)), stubs(root)
    return sorted(name for name in fresh.keys() | held.keys() if fresh.get(name) != held.get(name))


def lint(root: Path = ROOT) -> None:
    """Raises CalledProcessError with buf's words where a .proto file breaks the rules of buf.yaml."""
    run([buf(), "lint"], root)


def breaking(root: Path = ROOT, commit: str = "HEAD") -> bool:
    """Whether there was a committed protocol to compare with; raises CalledProcessError where peers would break."""
    listed = git(root, "ls-tree", "-r", "--name-only", commit, "--", "protos")
    names = [name for name in (listed or b"").decode().splitlines() if name.endswith(".proto")]
    if not names:
        return False
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            text = git(root, "show", f"{commit}:{name}")
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text or b"")
        shutil.copy(root / "buf.yaml", folder)
        run([buf(), "breaking", "--against", folder], root)
    return True


def buf() -> str:
    """The buf of this environment, else the one on PATH."""
    beside = Path(sys.executable).parent / "buf"
    return str(beside) if beside.exists() else "buf"


def git(root: Path, *arguments: str) -> bytes | None:
    """What git prints, None where there is no git, no repository or no such thing in it."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def run(command: list[str], root: Path) -> None:
    done = subprocess.run(
        command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, output=done.stdout)


def main(arguments: list[str]) -> int:
    verbs = ("generate", "lint", "breaking", "check")
    if len(arguments) != 1 or arguments[0] not in verbs:
        print(f"usage: python -m deploy.protos {'|'.join(verbs)}", file=sys.stderr)
        return 2
    verb = arguments[0]
    try:
        if verb == "generate":
            generate(ROOT)
        if verb in ("lint", "check"):
            lint()
        if verb in ("breaking", "check"):
            breaking()
        if verb == "check" and (names := stale()):
            print(f"protos: run `make protos`, these stubs are not up to date: {', '.join(names)}", file=sys.stderr)
            return 1
    except subprocess.CalledProcessError as error:
        print(f"protos: {' '.join(map(str, error.cmd[:3]))} failed:\n{error.output}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"protos: {error}; `make {verb if verb == 'check' else 'protos'}` installs what is needed", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
