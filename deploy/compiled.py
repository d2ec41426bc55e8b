"""Compiles the machines and the simulator to C with mypyc: ``python -m deploy.compiled [DIR]``.

DIR, by default build/compiled, gets a copy of all packages, the machines compiled, and nothing else changes: Python
remains what is shipped, tested and read. To run what is there, put it before the checkout, or be in it:
``PYTHONPATH=build/compiled baton simulate ...``. Building takes minutes, the `test` extra (mypyc comes with mypy), a C
compiler and Python's headers.

mypyc leaves it to `dataclasses` to write `__init__`, in Python, and does not compile a class with any other decorator.
So in the copy every dataclass gets its `__init__` in plain sight, and is no longer frozen there: that nobody assigns is
what mypy has checked before. Equality, hash, order, `replace`, `asdict` and patterns are the same. One thing is
different for code that is compiled: a tuple of known length is a value without identity, `is` between two is False.

With gcc it is compiled twice: the second time knows which branches some thousand simulated requests took in the first.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "compiled"
ROOMS = ("core", "scheduler", "sim")
FILES = ("transfer/sink.py", "transfer/source.py")
APART = {
    # Has a part in making classes, or is none that is called often.
    *("core/config.py", "core/machine.py", "core/quick.py", "core/standing.py", "core/state.py", "core/words.py"),
    *("scheduler/cost_refit.py", "scheduler/liveness.py", "scheduler/membership.py"),
    *("scheduler/fluid.py", "scheduler/layout.py", "scheduler/plan.py", "scheduler/planner.py", "sim/planning.py"),
    *("scheduler/ratio.py", "scheduler/ratio_events.py", "scheduler/split.py"),
    *("sim/deployment.py", "sim/generators.py", "sim/goodput.py", "sim/page.py", "sim/plot.py", "sim/predicted.py"),
    *("sim/recordings.py", "sim/report.py", "sim/scenario.py"),
    *("sim/source.py", "sim/study.py", "sim/timeline.py", "sim/traces.py"),
}
CONFIG = """
[mypy]
python_version = 3.11
strict = true
explicit_package_bases = true
mypy_path = $MYPY_CONFIG_FILE_DIR
"""
SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup
names = sys.argv.pop().split(",")
extensions = mypycify(["--config-file=mypy.ini", *names], opt_level="3", debug_level="0", multi_file=True)
setup(name="baton-compiled", packages=[], ext_modules=extensions)
"""
FLAGS = "-march=native -ffp-contract=off -fno-semantic-interposition"
"""For this machine alone; a product and a sum are rounded each, as they are in Python."""
WHOLE = "-flto=auto"
"""All modules are compiled as one."""
TAUGHT = "-fprofile-use -fprofile-partial-training -Wno-missing-profile"
LESSONS = ("[0.7, null, 1000]", "[0.7, 60000, 1000]", "[0.2, null, 1000]", "[0.2, 13500, 1000]")
"""What the first compilation simulates for the second: bench.simulator's loads, with ample KV and with little."""


def files(root: Path = ROOT) -> list[str]:
    """What is compiled, relative to `root`."""
    found = [str(path.relative_to(root)) for room in ROOMS for path in sorted((root / room).glob("*.py"))]
    return [name for name in (*found, *FILES) if name not in APART and not name.endswith("__init__.py")]


def plain(text: str) -> str:
    """A module whose dataclasses have their `__init__` in plain sight, and no other decorator."""
    lines = text.split("\n")
    edits = [edit for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef) for edit in _edits(node)]
    for first, last, new in sorted(edits, reverse=True):
        lines[first:last] = new
    return "\n".join(lines)


Edit = tuple[int, int, list[str]]
"""Lines [first, last) and what comes in their place."""


def _edits(node: ast.ClassDef) -> Iterator[Edit]:
    decorators = {ast.unparse(each).partition("(")[0]: each for each in node.decorator_list}
    dataclass = decorators.get("dataclass")
    methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    if dataclass is None or not fields or node.bases or "__init__" in methods:
        return
    given = {each.arg: each.value for each in dataclass.keywords} if isinstance(dataclass, ast.Call) else {}
    options = ["init=False"] + [f"{name}={ast.unparse(given[name])}" for name in ("eq", "order") if name in given]
    if "frozen" in given and "eq" not in given and "__hash__" not in methods:
        options.append("unsafe_hash=True")
    for each in node.decorator_list:
        new = [f"@dataclass({', '.join(options)})"] if each is dataclass else []
        yield each.lineno - 1, each.end_lineno or each.lineno, new
    parameters, body = ["self"], []
    for field in fields:
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        default, value = None if field.value is None else ast.unparse(field.value), name
        if isinstance(field.value, ast.Call) and ast.unparse(field.value.func) == "field":
            said = {part.arg: part.value for part in field.value.keywords}
            if "init" in said:
                continue
            default = ast.unparse(said["default"]) if "default" in said else None
            if "default_factory" in said:
                kind, default = f"{kind} | None", "None"
                value = f"({ast.unparse(said['default_factory'])})() if {name} is None else {name}"
        parameters.append(f"{name}: {kind}" + (f" = {default}" if default is not None else ""))
        body.append(f"self.{name} = {value}")
    if "__post_init__" in methods:
        body.append("self.__post_init__()")
    margin = " " * (node.col_offset + 4)
    init = [f"{margin}def __init__({', '.join(parameters)}) -> None:", *(f"{margin}    {line}" for line in body)]
    behind = fields[-1]
    index = node.body.index(behind) + 1
    after = node.body[index] if index < len(node.body) else None
    end = after if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else behind
    yield end.end_lineno or end.lineno, end.end_lineno or end.lineno, ["", *init]


def build(out: Path = OUT, root: Path = ROOT) -> None:
    """Make `out` anew; raises CalledProcessError with the words of mypyc or of the C compiler."""
    shutil.rmtree(out, ignore_errors=True)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    for room in sorted({name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]} | {"bench"}):
        shutil.copytree(root / room, out / room, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"))
    names = files(out)
    for name in names:
        path = out / name
        path.write_text(plain(path.read_text()))
    (out / "mypy.ini").write_text(CONFIG)
    (out / "setup.py").write_text(SETUP)
    if _gcc():
        _compile(out, names, f"{FLAGS} {WHOLE} -fprofile-generate")
        for lesson in LESSONS:
            _run(out, ["-m", "bench.simulator", "--one", lesson])
        _compile(out, names, f"{FLAGS} {WHOLE} {TAUGHT}")
    else:
        _compile(out, names, FLAGS)
    shutil.rmtree(out / "build")


def _compile(out: Path, names: list[str], flags: str) -> None:
    words = ["build_ext", "--inplace", "--force", "--parallel", str(os.cpu_count() or 1), ",".join(names)]
    _run(out, ["setup.py", *words], CFLAGS=flags, LDFLAGS=f"-O3 {flags}")


def _run(out: Path, words: list[str], **more: str) -> None:
    """Python in the copy, where it finds the copy's own packages and no others."""
    environment = {**os.environ, "PYTHONPATH": "", **more}
    subprocess.run([sys.executable, *words], cwd=out, env=environment, check=True)


def _gcc() -> bool:
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    said = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False)
    return "Free Software Foundation" in said.stdout


def main() -> None:
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else OUT)


if __name__ == "__main__":
    main()
