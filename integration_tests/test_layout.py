"""Where things live and who may import whom: read from the source, and tried in a fresh process."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hf_paged_kernels
import pytest

import hf_paged

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "hf_paged_kernels"


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, relative ones resolved: ``hf_paged.paging.pool``, ``torch``."""
    base = ROOT / "kernels" if KERNELS in path.parents else ROOT
    package = path.relative_to(base).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            yield from names
            # "from . import ops" imports hf_paged_kernels.attention.ops, whatever the __init__ beside it imports.
            if not all(name in MODULES for name in names):
                yield module


def offenders(folder: Path, *forbidden: str) -> list[str]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"no source in {folder}"
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "kernels" if KERNELS in path.parents else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in (ROOT / "eval", ROOT / "hf_paged", KERNELS)
    for path in sorted(folder.rglob("*.py"))
}


@functools.cache
def imported_modules() -> dict[str, set[str]]:
    """Which of MODULES each of them imports, for type checkers alone too."""
    return {name: {m for m in imports(path) if m in MODULES and m != name} for name, path in MODULES.items()}


def parents(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


@pytest.mark.quick
def test_imports_make_no_circles():
    graph = imported_modules()

    def reached(name: str) -> set[str]:
        seen, left = set(), [name]
        while left:
            more = graph[left.pop()] - seen
            seen |= more
            left += more
        return seen

    reach = {name: reached(name) for name in graph}
    circles = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    assert circles == set()


# Rooms from the top down: a module imports its own room, and rooms of lines below. The longest name counts.
ROOMS = {
    "packages": [
        ["eval"],
        ["hf_paged"],
        ["hf_paged.lm_eval_model", "hf_paged.serve"],
        ["hf_paged.generation", "hf_paged.registration"],
        ["hf_paged.engine", "hf_paged.attention"],
        ["hf_paged.cache", "hf_paged.fusion"],
        ["hf_paged.hooks", "hf_paged.mixed_precision"],
        ["hf_paged.transformers_internals", "hf_paged.paging"],
        ["hf_paged.errors"],
        ["hf_paged_kernels"],
    ],
    "engine": [
        ["hf_paged.engine"],
        ["hf_paged.engine.startup"],
        ["hf_paged.engine.core"],
        ["hf_paged.engine.collect"],
        ["hf_paged.engine.in_flight", "hf_paged.engine.endings"],
        ["hf_paged.engine.execution"],
        ["hf_paged.engine.scheduling"],
        ["hf_paged.engine.sampling"],
        [f"hf_paged.engine.{name}" for name in ("config", "trace", "async_copy", "process", "turn_lock", "group")],
        ["hf_paged.engine.ranks"],
    ],
    "kernels": [
        ["hf_paged_kernels"],
        ["hf_paged_kernels.api", "hf_paged_kernels.warm_up"],
        ["hf_paged_kernels.attention.shared_prefix"],
        [f"hf_paged_kernels.{feature}.ops" for feature in ("attention", "layers", "sampling")],
        [f"hf_paged_kernels.{feature}" for feature in ("attention", "linear", "layers", "sampling")],
        ["hf_paged_kernels.checks", "hf_paged_kernels.eager"],
        ["hf_paged_kernels.launch_triton"],
        ["hf_paged_kernels.backend", "hf_paged_kernels.compat_gluon", "hf_paged_kernels.dependent_launch_triton"],
        ["hf_paged_kernels.settings"],
    ],
}
KNOWN_CLIMBS = {
    "packages": set(),
    "engine": set(),
    "kernels": {
        ("hf_paged_kernels.layers.reference", "hf_paged_kernels.attention.reference"),
        ("hf_paged_kernels.layers.rotary_write_triton", "hf_paged_kernels.attention.pages_triton"),
    },
}
"""An import that no longer climbs goes from here; none may be added."""


@pytest.mark.quick
@pytest.mark.parametrize("part", ROOMS)
def test_rooms_are_entered_from_above(part):
    level = {room: i for i, rooms in enumerate(ROOMS[part]) for room in rooms}

    def room_of(module: str) -> str | None:
        return max((name for name in {module, *parents(module)} if name in level), key=len, default=None)

    climbs = set()
    for module, imported in imported_modules().items():
        for other in imported:
            here, there = room_of(module), room_of(other)
            if here and there and here != there and level[there] <= level[here]:
                climbs.add((module, other))
    assert climbs == KNOWN_CLIMBS[part]


MOST_LINES_OF_A_CLASS = 400
KNOWN_LARGE_CLASSES: set[str] = set()
"""A class that has shrunk goes from here; none may be added. Ruff counts parameters and branches, see pyproject."""


@pytest.mark.quick
def test_classes_are_of_a_size_that_can_be_read():
    large = {
        node.name
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= MOST_LINES_OF_A_CLASS
    }
    assert large == KNOWN_LARGE_CLASSES


def test_names_in_docstrings_exist():
    """A role such as :func:`name` outlives what it names, where a rename forgets it."""
    known, asked = set(), {}
    for module, path in MODULES.items():
        text = path.read_text("utf-8")
        known |= {*module.split("."), *re.findall(r"\w+", re.sub(r":\w+:`[^`]*`", "", text))}
        asked |= dict.fromkeys(re.findall(r":(?:func|class|meth|mod|data|attr):`[\w.~]*?(\w+)`", text), module)
    assert len(asked) > 100
    assert {name: module for name, module in asked.items() if name not in known} == {}


PRIVATE_NAMES_OF_OTHERS = {"_from_config", "_attn_implementation", "_get_help_string"}


@pytest.mark.quick
def test_eval_touches_no_private_attribute():
    touched = {
        node.attr
        for name, path in MODULES.items()
        if name.startswith("eval.")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    assert touched - PRIVATE_NAMES_OF_OTHERS == set()


@pytest.mark.quick
def test_no_test_imports_another():
    """What tests share is in ``support/``, which conftest.py puts on the path."""
    tests = {path.stem: path for path in (ROOT / "integration_tests").rglob("test_*.py")}
    assert len(tests) > 80
    for path in tests.values():
        assert not {module.split(".")[0] for module in imports(path)} & tests.keys(), path
        assert not re.search(r"sys\.path(\.| \+=)", path.read_text("utf-8")), path


def test_the_kernels_folder_is_not_a_package():
    """``kernels`` is the import name of Hugging Face's hub-kernel package, which transformers imports when present."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").glob("*.py")] == []


@pytest.mark.quick
@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/hf_paged_kernels", ("transformers", "hf_paged", "eval")),
        ("hf_paged/paging", ("hf_paged_kernels", "transformers", "hf_paged.attention", "hf_paged.cache")),
        ("hf_paged", ("eval", "integration_tests", "triton", "flash_attn", "kernels")),
    ],
)
def test_imports_point_down_only(folder, forbidden):
    assert offenders(ROOT / folder, *forbidden) == []


def test_paging_needs_torch_and_the_errors_only():
    allowed = ("torch", "hf_paged.paging", "hf_paged.errors")
    found = {m for path in (ROOT / "hf_paged" / "paging").rglob("*.py") for m in imports(path)}
    outside = {m for m in found if m.partition(".")[0] not in sys.stdlib_module_names and not m.startswith(allowed)}
    assert outside == set()


def test_the_package_uses_triton_in_kernel_files_only():
    files = [path for path in KERNELS.rglob("*.py") if not path.stem.endswith(("_triton", "_gluon"))]
    assert [p.name for p in files if any(m.partition(".")[0] == "triton" for m in imports(p))] == []


LAUNCHERS = {
    f"hf_paged_kernels.{name}"
    for module, function in (
        ("backend", "uses_gluon"),
        ("attention.flash_forward_triton", "flash_attention_launch"),
        ("attention.paged_quantized_triton", "quantized_paged_attention_launch"),
        ("attention.paged_triton", "paged_attention_launch"),
        ("attention.paged_quantized_triton", "quantized_paged_attention_launch"),
    )
    for name in (module, f"{module}.{function}")
}


@pytest.mark.quick
@pytest.mark.parametrize("package", ["hf_paged", "hf_paged_kernels"])
def test_eval_uses_public_names_only(package):
    public = {"hf_paged": hf_paged, "hf_paged_kernels": hf_paged_kernels}[package].__all__
    allowed = {package, *(f"{package}.{name}" for name in public)}
    for path in (ROOT / "eval").rglob("*.py"):
        if path.stem in ("tune_kernels", "bench_decode_parts", "stub_gpu"):
            continue  # the tables of the kernels' settings, kernels that are part of the engine, what asks for a GPU
        found = {m for m in imports(path) if m.partition(".")[0] == package}
        # The kernel benchmark also times the launcher that a call would not choose on this device.
        assert found <= allowed | (LAUNCHERS if path.parts[-2:] == ("kernel_bench", "calls.py") else set()), path


def run_fresh(code: str) -> str:
    """Run code in a new interpreter at the root, with the folders on the path that pytest has."""
    setup = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TINY_LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1)
model = LlamaForCausalLM._from_config(config, attn_implementation="paged_flash")
print(list(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False, eos_token_id=None).shape))
"""
STARTED = """
print(sorted(name for name in sys.modules if name.endswith("_triton") and name.startswith("hf_paged")))
print(torch.cuda.is_initialized())
"""


def test_a_fresh_process_serves_a_model_and_starts_no_gpu():
    """Nor does it import triton. transformers' model classes import torch._dynamo, and that triton: what they import
    first is not ours."""
    out = run_fresh(
        "import torch\n"
        "from transformers import DynamicCache, GenerationMixin, PreTrainedModel\n"
        "from transformers import modeling_flash_attention_utils, masking_utils\n"
        "before = {name for name in sys.modules if name.partition('.')[0] == 'triton'}\n"
        "import hf_paged\n"
        "print({name for name in sys.modules if name.partition('.')[0] == 'triton'} - before)\n"
        "import hf_paged_kernels\n" + STARTED + TINY_LLAMA + STARTED
    )
    assert out.splitlines() == ["set()", "[]", "False", "[1, 5]", "[]", "False"]


def test_importing_the_kernels_alone_needs_neither_transformers_nor_triton():
    out = run_fresh("import hf_paged_kernels; print([name in sys.modules for name in ('transformers', 'triton')])")
    assert out.strip() == "[False, False]"


def test_hub_kernels_are_still_absent_or_whole():
    """A bare ``kernels/`` folder on the path must not look like the hub-kernel package to transformers."""
    out = run_fresh(
        "import importlib.metadata as metadata\n"
        "from transformers.utils import is_kernels_available\n"
        "installed = any(d.name == 'kernels' for d in metadata.distributions())\n"
        "print(is_kernels_available() and not installed)\n"
    )
    assert out.strip() == "False"


@pytest.mark.quick
@pytest.mark.parametrize("package", [hf_paged, hf_paged_kernels], ids=lambda package: package.__name__)
def test_all_lists_the_public_names(package):
    assert sorted(package.__all__) == sorted(set(package.__all__)), "a name is listed twice"
    for name in package.__all__:
        assert getattr(package, name) is not None
    tree = ast.parse(Path(package.__file__).read_text("utf-8"))
    imported = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    # What __init__ imports for its own use is not public.
    assert set(imported) - set(package.__all__) <= {"register"}


@pytest.mark.quick
def test_every_folder_of_tests_has_quick_ones():
    for folder in ("cache", "engine", "eval", "generation", "models", "ops"):
        files = (ROOT / "integration_tests" / folder).glob("test_*.py")
        assert any("pytest.mark.quick" in path.read_text("utf-8") for path in files), folder


@pytest.mark.quick
def test_one_version():
    assert pyproject_values("version") == [f'"{hf_paged.__version__}"']


def test_the_wheel_holds_the_two_packages():
    assert '["hf_paged", "kernels/hf_paged_kernels"]' in pyproject_values("packages")


def pyproject_values(key: str) -> list[str]:
    return re.findall(rf"^{key} = (.+)$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
