"""The rules that a machine can check: which way imports point, what is never called, what `__all__` holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top down: a unit (a module or a package directly under gpmetric/) imports units of lower rows only.
LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"commands", "config", "command_help"},
    {"terminal"},
    {"reporting"},
    {"analysis", "tuning", "listing"},
    {"evolution", "allocation", "structured", "packing"},
    {"pruning"},
    {"session"},
    {"executors"},
    {"calibration", "evaluation", "formats", "functions", "tracking"},
    {"extensible"},
    {"codegen", "loading", "metrics", "options"},
    {"blockwise", "blocks", "formula_files", "results"},
    {"expression", "data", "models", "demo", "provenance", "journal", "targets"},
    {"digests", "outputs", "stored_names", "stored_experts"},
    {"experts", "operands"},
    {"files", "tensor_file", "notebook", "pictures", "plugins"},
    {"errors", "pareto", "lazy", "interrupts", "kernels", "slim_models", "placement", "discovered", "modules"},
    {"plain"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

MAX_LINES = 400

# Nothing we read may run: no code from text, no pickle (dill and friends are pickle too).
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_NAMES = {"sympify", "parse_expr"}
FORBIDDEN_KEYWORDS = {("trust_remote_code", True), ("weights_only", False), ("shell", True), ("allow_pickle", True)}
# by module, what starts a shell or reads a pickle, called or imported
FORBIDDEN_MEMBERS = {
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
}
CAREFUL = {("torch", "load"): "weights_only"}  # a pickle unless this says otherwise

MODULES = sorted([*ROOT.glob("gpmetric/**/*.py"), *ROOT.glob("kernels/**/*.py")])
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))


def test_imports_point_down() -> None:
    assert_none(lambda path, source: upward_imports(source, module_name(path), path.name == "__init__.py"))


# Functions of upper layers that lower ones stand for by name, since only calling them needs the upper layer: a metric
# shows and exports itself, a file of one may be a ledger, a Python function shows progress as its command does.
UPWARD_BY_NAME = {("metrics", "formats"), ("formula_files", "evolution"), ("functions", "commands")}


def test_what_is_named_lazily_points_down_too() -> None:
    found = set()
    for path in MODULES:
        own = unit_of(module_name(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and called_name(node) == "lazy" and isinstance(node.args[0], ast.Constant):
                unit = unit_of(str(node.args[0].value).partition(":")[0])
                found |= {(own, unit)} if unit != own and LEVEL[unit] <= LEVEL[own] else set()
    assert found == UPWARD_BY_NAME


def test_nothing_runs_text_or_unpickles() -> None:
    assert len(BENCHMARKS) > 20
    assert_none(lambda path, source: unsafe_uses(source), [*MODULES, *BENCHMARKS])


def test_all_is_complete() -> None:
    """Its order is ruff's (RUF022: constants, classes, functions): `ruff check --fix` sets it, test_style checks it."""
    assert_none(lambda path, source: export_problems(source))


def test_files_stay_short() -> None:
    assert_none(lambda path, source: [f"{n} lines"] if (n := len(source.splitlines())) > MAX_LINES else [])


def assert_none(check: Callable[[Path, str], list[str]], modules: Sequence[Path] = MODULES) -> None:
    """Shows every problem that a check finds in any module, each with the module's path."""
    assert len(MODULES) > 100
    found = [
        f"{path.relative_to(ROOT)}: {one}" for path in modules for one in check(path, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", ["gpmetric", "gpmetric.cli", "gpmetric.expression", "gpmetric.terminal.next_steps"])
def test_import_is_light(module: str) -> None:
    """`gpmetric --help` and parsing a formula answer at once: the heavy libraries load when they are first needed."""
    heavy = ["torch", "transformers", "sympy"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "source", "problem"),
    [
        ("gpmetric.cli", "from gpmetric.pruning import mask", None),
        ("gpmetric.cli", "import gpmetric.expression.tree as tree", None),
        ("gpmetric.pruning.mask", "from gpmetric.pruning.metrics import x", None),
        (
            "gpmetric.pruning.mask",
            "from . import metrics\nfrom .metrics import x\nfrom ..errors import MaskError",
            None,
        ),
        ("gpmetric", "def __getattr__(name):\n    from gpmetric.cli import main", None),
        ("gpmetric.pruning.mask", "from gpmetric.evolution import ledger", "evolution"),
        ("gpmetric.pruning.mask", "from ..evolution import ledger", "evolution"),
        ("gpmetric.pruning.mask", "from gpmetric import cli", "cli"),
        ("gpmetric.pruning.mask", "import gpmetric.cli", "cli"),
        ("gpmetric.pruning.mask", "import importlib\nimportlib.import_module('gpmetric.cli')", "cli"),
        ("gpmetric.calibration.cache", "from gpmetric.formats import python", "formats"),
        ("gpmetric.lazy", "def late():\n    import gpmetric.errors", "errors"),
        ("gpmetric.kernels.wanda", "from gpmetric.errors import GpmetricError", "errors"),
        ("gpmetric.pruning.mask", "from gpmetric import discover", "__init__"),
        ("gpmetric.pruning.mask", "import gpmetric", "__init__"),
        ("gpmetric.cli", "from gpmetric.novelty import x", "novelty"),
        ("gpmetric.novelty", "import torch", "novelty"),
        ("gpmetric.cli", "from kernels import wanda", "kernels"),
    ],
)
def test_the_import_check_sees(module: str, source: str, problem: str | None) -> None:
    found = upward_imports(source, module, is_package=module == "gpmetric")
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("model.eval()\nre.compile('a')\ntorch.compile(f)", True),
        ("load(x, trust_remote_code=False, weights_only=True)", True),
        ("eval('1')", False),
        ("builtins.exec('1')", False),
        ("compile('1', '', 'eval')", False),
        ("import pickle", False),
        ("from torch.serialization import pickle", False),
        ("from sympy import sympify", False),
        ("sympy.sympify(text)", False),
        ("load(x, trust_remote_code=True)", False),
        ("options = {'trust_remote_code': True}", False),
        ("torch.load(x, weights_only=False)", False),
        ("torch.load(x)", False),
        ("from torch import load", False),
        ("json.load(x)\nsafetensors.torch.load(x)\nyaml.safe_load(x)\nsubprocess.run(['ls'])", True),
        ("subprocess.run('ls', shell=True)", False),
        ("numpy.load(x, allow_pickle=True)", False),
        ("os.system('ls')", False),
        ("from os import popen as ask", False),
        ("run = os.system", False),
        ("run = eval", False),
        ("map(exec, texts)", False),
        ("yaml.load(x)", False),
        ("from yaml import load", False),
        ("importlib.import_module('pickle')", False),
    ],
)
def test_the_safety_check_sees(source: str, safe: bool) -> None:
    assert (unsafe_uses(source) == []) == safe


@pytest.mark.parametrize(
    ("source", "good"),
    [
        ("def f(): ...", True),
        ("__all__ = ['A', 'f']\ndef f(): ...\nclass A: ...\ndef _g(): ...", True),
        ("__all__ = ['f']\ndef __getattr__(name): ...", True),
        ("__all__ = ['A']\ndef f(): ...\nclass A: ...", False),
        ("__all__ = ['f', 'gone']\ndef f(): ...", False),
        ("__all__ = ['f', 'f']\ndef f(): ...", False),
    ],
)
def test_the_export_check_sees(source: str, good: bool) -> None:
    assert (export_problems(source) == []) == good


def module_name(path: Path) -> str:
    """Dotted name under which a file is imported; kernels/ is installed as gpmetric.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "gpmetric" else ("gpmetric", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def upward_imports(source: str, module: str, is_package: bool) -> list[str]:
    """One line for every import that does not point to a lower layer or stay within the module's own unit."""
    own = unit_of(module)
    if own not in LEVEL:
        return [f"gpmetric.{own} is in no layer: give it a place in LAYERS and in the design"]
    problems = []
    for line, target in imported_modules(ast.parse(source), module if is_package else module.rpartition(".")[0]):
        if target.partition(".")[0] == "kernels":
            problems.append(f"line {line}: kernels is Hugging Face's package, ours is gpmetric.kernels")
        elif target.partition(".")[0] == "gpmetric" and (unit := unit_of(target)) != own:
            if unit not in LEVEL:
                problems.append(f"line {line}: gpmetric.{unit} is in no layer")
            elif LEVEL[unit] <= LEVEL[own]:
                problems.append(f"line {line}: {module} imports {unit}, which is not below {own}")
    return problems


def unit_of(module: str) -> str:
    """First name below gpmetric, `__init__` for gpmetric itself."""
    return [*module.split("."), "__init__"][1]


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, at any depth, TYPE_CHECKING or not, and of import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            # `from gpmetric import x`: a unit when there is one of that name, else a name of the public API.
            units = [alias.name for alias in node.names if base == "gpmetric" and is_unit(alias.name)]
            yield from ((node.lineno, f"gpmetric.{unit}") for unit in units)
            if len(units) < len(node.names):
                yield node.lineno, base
        elif isinstance(node, ast.Call) and called_name(node) == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def is_unit(name: str) -> bool:
    return name in LEVEL or (ROOT / "gpmetric" / name).is_dir() or (ROOT / "gpmetric" / f"{name}.py").is_file()


def called_name(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def unsafe_uses(source: str) -> list[str]:
    """One line for every use of what FORBIDDEN_* names."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found += [(node.lineno, name) for name in called_builtin(node) & FORBIDDEN_CALLS]
            found += [(node.lineno, name) for name in careless(node)]
            found += [(node.lineno, key.arg or "") for key in node.keywords if is_forbidden(key.arg, key.value)]
        elif isinstance(node, ast.Dict):
            names_and_values = zip(map(constant, node.keys), node.values, strict=True)
            found += [(node.lineno, str(name)) for name, value in names_and_values if is_forbidden(name, value)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            parts = {part for name in names for part in name.split(".")}
            members = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            module = getattr(node, "module", None) or ""
            careful = {name for of, name in CAREFUL if of == module}
            found += [(node.lineno, name) for name in members & (FORBIDDEN_MEMBERS.get(module, set()) | careful)]
            found += [(node.lineno, name) for name in parts & (FORBIDDEN_MODULES | FORBIDDEN_NAMES)]
        elif isinstance(node, ast.Attribute):
            of = getattr(node.value, "id", "")
            if node.attr in FORBIDDEN_NAMES | FORBIDDEN_MEMBERS.get(of, set()):
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FORBIDDEN_CALLS:
            found.append((node.lineno, node.id))  # handed on, or called
    return [f"line {line}: {name}" for line, name in sorted(found)]


def careless(call: ast.Call) -> set[str]:
    """A call of CAREFUL without its keyword, or an import of a forbidden module by its name."""
    function = call.func
    of = getattr(function.value, "id", "") if isinstance(function, ast.Attribute) else ""
    wanted = CAREFUL.get((of, called_name(call)))
    found = {called_name(call)} if wanted and wanted not in {key.arg for key in call.keywords} else set()
    if called_name(call) == "import_module":
        found |= {str(constant(one)) for one in call.args} & FORBIDDEN_MODULES
    return found


def called_builtin(call: ast.Call) -> set[str]:
    """Name of the builtin that is called; `model.eval()` and `re.compile()` are methods and not meant."""
    if isinstance(call.func, ast.Name):
        return {call.func.id}
    on_builtins = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "builtins"
    return {called_name(call)} if on_builtins else set()


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def is_forbidden(name: object, value: ast.expr) -> bool:
    return any(name == keyword and constant(value) is bad for keyword, bad in FORBIDDEN_KEYWORDS)


def export_problems(source: str) -> list[str]:
    """What is wrong with a module's `__all__`: public definitions it lacks, names that do not exist or stand twice."""
    body = ast.parse(source).body
    exported = next(
        (ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and is_all(node)), None
    )
    if exported is None:
        return []
    defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    problems = [f"twice: {name}" for name in sorted(set(exported)) if exported.count(name) > 1]
    problems += [f"missing: {name}" for name in sorted(defined - set(exported)) if not name.startswith("_")]
    if "__getattr__" not in defined:  # with it, names may come on first use
        bound = defined | {name for node in body for name in bound_names(node)}
        problems += [f"does not exist: {name}" for name in exported if name not in bound]
    return problems


def is_all(node: ast.Assign) -> bool:
    return any(getattr(target, "id", "") == "__all__" for target in node.targets)


def bound_names(statement: ast.stmt) -> Iterator[str]:
    """Names that an assignment or import binds, also one inside `if TYPE_CHECKING:` or `try:`."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
