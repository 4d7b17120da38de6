"""The house itself: what is shipped, what an import costs, and which room may import from which."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
NOT_SHIPPED = {"tests", "examples", "build", "dist"}
DATA = {"py.typed", "kernels/evidence.json", "interop/demo/sample.csv", "bench/static/record.json"}

# Who may import from whom; "" is the root: __init__.py and __main__.py.
FOLDERS = {
    "": {"kernels", "layers", "interop", "conformance", "bench", "extras"},
    "kernels": {"extras"},
    "layers": {"kernels"},
    "interop": {"layers", "kernels", "extras"},
    "conformance": {"kernels"},
    "bench": {"", "conformance", "kernels", "extras"},
}
EVERYWHERE = {"spec", "visibility", "philox", "sinks", "biases", "tracing"}
KERNELS = {
    "spec": {"mask_algebra"},  # a type
    "visibility": set(),
    "masks": {"mask_algebra", "mask_compile", "mask_intervals", "validation"},
    "mask_algebra": {
        "mask_compile",
        "mask_intervals",
        "mask_tiles",
        "mask_plot",
        "mask_converters",
        "validation",
    },
    "mask_compile": {"mask_algebra", "mask_intervals", "mask_tiles"},  # the first one for a type
    "mask_intervals": set(),
    "mask_tiles": set(),
    "mask_plot": set(),
    "mask_converters": {"masks", "mask_algebra", "validation"},
    "packed": set(),
    "philox": set(),
    "sinks": set(),
    "options": set(),
    "validation": {"options"},
    "sequences": {"validation"},
    "nested": set(),
    "merge": {"validation"},
    "biases": set(),
    "tracing": set(),
    "evidence": set(),
    "reference": {"packed"},
    "flops": set(),
    "vmap": set(),
    "library": set(),
    "fallback": {"fallback_blocks", "fallback_plan", "fallback_problems", "fallback_runs", "merge", "packed"},
    "fallback_problems": {"fallback_band", "fallback_blocks", "fallback_mask_plan", "fallback_plan"},
    "fallback_mask_plan": {"fallback_plan"},
    "fallback_runs": {"fallback_blocks", "fallback_plan", "fallback_problems"},
    "second_order": {"fallback_blocks", "fallback_plan", "fallback_problems"},
    "differentials": {"library", "second_order", "vmap"},
    "fallback_blocks": {"fallback_plan"},
    "fallback_band": {"fallback_plan"},
    "fallback_plan": set(),
    # the implementations are imported when first called, by name
    "ops": {"differentials", "evidence", "flops", "library", "vmap"},
    "statistics": {"library", "vmap"},
    "dispatch": {"hopper", "ops", "reference", "evidence", "statistics"},
    "functional": {"dispatch", "masks", "mask_algebra", "nested", "options", "sequences", "validation"},
    "weights": {"functional", "validation"},
    "mask_work": {"flops"},
    "explain": {
        "mask_work",
        "functional",
        "nested",
        "options",
        "sequences",
        "dispatch",
        "evidence",
        "flops",
    },
    "call_flags": set(),
    "explain_command": {"explain", "call_flags"},
    "triton": {"descriptors", "evidence"},
    "gluon": {"descriptors", "hopper", "triton"},
    "descriptors": set(),
    "hopper": {"descriptors"},
}
IMPORT_TRITON = {
    "kernels/triton",
    "kernels/gluon",
    "bench/static",  # compiles what the former defines
}


def sources() -> Iterator[PurePosixPath]:
    """Every Python file that is part of the package, relative to the root."""
    for path in sorted(ROOT.rglob("*.py")):
        relative = PurePosixPath(path.relative_to(ROOT).as_posix())
        if relative.parts[0] not in NOT_SHIPPED and not any(part.startswith(".") for part in relative.parts):
            yield relative


SOURCES = list(sources())
SUITES = [path for path in SOURCES if path.parts[0] == "bench" and path.name.startswith("test_")]


def python(code: str, *, cwd: Path, options: tuple[str, ...] = (), **environment: str) -> str:
    """Standard output of a fresh interpreter; its standard error is the message if it fails."""
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env={**os.environ, "UNDIVIDED_IMPL": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imports(path: PurePosixPath) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import in the file, lazy ones and those for type checking too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.level, f"{node.module}.{alias.name}" if node.module else alias.name


def target(path: PurePosixPath, level: int, name: str) -> PurePosixPath:
    """The module that a relative import means, without suffix; "." is the root's __init__."""
    folder = path.parents[level - 1]
    found = folder
    for part in name.split("."):
        if not (ROOT / found / part).is_dir() and not (ROOT / found / f"{part}.py").is_file():
            break
        found = found / part
    assert found != folder or (ROOT / folder / "__init__.py").is_file(), f"{path}: no {name} in {folder}"
    return found


def test_every_file_has_its_room() -> None:
    """Catches a folder or a kernel module that the arrows below do not know."""
    assert len(SOURCES) == len(set(SOURCES)) > 20
    assert {path.parts[0] if len(path.parts) > 1 else "" for path in SOURCES} <= set(FOLDERS)
    rooms = {path.parts[1].removesuffix(".py") for path in SOURCES if path.parts[0] == "kernels"}
    assert rooms <= set(KERNELS)


@pytest.mark.parametrize("path", [path for path in SOURCES if path not in SUITES], ids=str)
def test_imports_follow_the_arrows(path: PurePosixPath) -> None:
    """Catches a cycle in the making, an absolute import of ourselves, and triton where it may be absent."""
    folder = path.parts[0] if len(path.parts) > 1 else ""
    for level, name in imports(path):
        if level == 0:
            top = name.split(".")[0]
            assert top != "undivided", f"{path} imports {name} by name"
            assert top != "triton" or str(PurePosixPath(*path.parts[:2])) in IMPORT_TRITON, str(path)
            continue
        there = target(path, level, name)
        other = there.parts[0] if there.parts else ""
        if other != folder:
            assert other in FOLDERS[folder], f"{path} imports {there}"
        elif folder == "kernels":
            room, other = path.parts[1].removesuffix(".py"), there.parts[1]
            assert other in {room} | EVERYWHERE | KERNELS[room], f"{path} imports {there}"


def test_tests_and_suites_import_the_package_by_name() -> None:
    """Catches a second copy of the package, under the name of the checkout's folder."""
    tests = [PurePosixPath(file.relative_to(ROOT).as_posix()) for file in (ROOT / "tests").rglob("*.py")]
    assert PurePosixPath("tests/test_packaging.py") in tests
    for path in [*tests, *SUITES]:
        assert all(level == 0 for level, _ in imports(path)), str(path)


@pytest.mark.parametrize("folder", ["kernels", "bench", "tests"])
def test_namespace_folders_stay_namespaces(folder: str) -> None:
    """Catches an __init__.py that shadows the package `kernels`, or gets modules imported twice by pytest."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """Catches a folder missing from pyproject.toml, forgotten data, and tests that are shipped."""
    checkout = tmp_path / "und-main"  # as a downloaded archive unpacks
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(checkout)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("undivided-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    content = {name for name in names if ".dist-info/" not in name}
    assert content == {f"undivided/{name}" for name in [*map(str, SOURCES), *DATA]}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert any(name.endswith("entry_points.txt") for name in names)


def test_importing_brings_nothing_along(tmp_path: Path) -> None:
    """Catches an optional dependency, or the compiler, that everybody would have to load."""
    code = """
import sys, torch
before = set(sys.modules)
import undivided
new = {name for name in sys.modules if name not in before}
print(*sorted({name.split(".")[0] for name in new} - set(sys.stdlib_module_names)))
print(*sorted(name for name in new if name.startswith(("torch._dynamo", "torch._inductor"))))
print("triton" in sys.modules, "transformers" in sys.modules, "matplotlib" in sys.modules)
"""
    packages, compilers, optional = python(code, cwd=tmp_path).splitlines()
    assert set(packages.split()) <= {"undivided", "typing_extensions"}
    assert not compilers
    assert optional == "False False False"


def test_importing_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Catches a device initialised, random numbers drawn or a global setting changed by the import.

    (hazard D10)
    """
    code = """
import os, warnings, torch

def fail(*args, **kwargs):
    raise AssertionError("the import asked for a device")

def state():
    return (
        torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
        torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        dict(os.environ), os.getcwd(), os.listdir(), list(warnings.filters),
    )

torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = fail
torch.cuda.get_device_properties = torch.cuda.get_device_capability = fail
before = state()
import undivided, undivided.layers
assert state() == before
assert not torch.cuda.is_initialized()
"""
    python(code, cwd=tmp_path)


def test_importing_is_quick(tmp_path: Path) -> None:
    """Catches a heavy import. Processor time of the best of five: a busy machine does not count."""
    code = """
import time, torch
start = time.process_time()
import undivided
print(time.process_time() - start)
"""
    assert min(float(python(code, cwd=tmp_path)) for _ in range(5)) < 0.150


def test_everything_but_kernels_works_without_triton(tmp_path: Path) -> None:
    """Catches an import of triton on the way to the PyTorch path (Windows, macOS)."""
    code = """
import sys
sys.modules["triton"] = None
import torch, undivided, undivided.layers, undivided.interop, undivided.conformance
q = torch.randn(2, 4, 5, 8, requires_grad=True)
out = undivided.attention(q, q, q, causal=True)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, expected)
out.sum().backward()
x = torch.randn(2, 5, 16)
undivided.layers.MultiheadAttention(16, 4)(x, x, x)[1].sum().backward()
assert "triton" in str(undivided.explain(q, q, q))
try:
    undivided.attention(q, q, q, impl="triton")
except NotImplementedError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("impl='triton' ran")
"""
    python(code, cwd=tmp_path)


def test_transformers_builds_models_from_the_root() -> None:
    """Catches our folder `kernels` being taken for the package `kernels` that transformers looks for."""
    code = """
import sys
assert sys.path[0] == ""
import torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
model = LlamaForCausalLM(LlamaConfig(**sizes))
print(model(torch.tensor([[1, 2, 3]])).logits.shape)
"""
    assert "[1, 3, 11]" in python(code, cwd=ROOT, HF_HUB_OFFLINE="1")


def test_an_installed_package_kernels_wins_over_our_folder(tmp_path: Path) -> None:
    """Catches the same with that package present: from the root, `import kernels` must find it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    found = python("import kernels; print(kernels.__file__)", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert Path(found.strip()) == tmp_path / "kernels" / "__init__.py"
