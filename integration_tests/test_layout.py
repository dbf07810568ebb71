"""Where things live and who may import whom: read from the source, and tried in a fresh process."""

import ast
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
            yield module
            # "from . import ops" imports hf_paged_kernels.attention.ops.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def offenders(folder: Path, *forbidden: str) -> list[str]:
    files = sorted(folder.rglob("*.py"))
    assert files, f"no source in {folder}"
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports(path)
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


def test_the_kernels_folder_is_not_a_package():
    """``kernels`` is the import name of Hugging Face's hub-kernel package, which transformers imports when present."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert [path.name for path in (ROOT / "kernels").glob("*.py")] == []


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


@pytest.mark.parametrize("package", ["hf_paged", "hf_paged_kernels"])
def test_eval_uses_public_names_only(package):
    public = {"hf_paged": hf_paged, "hf_paged_kernels": hf_paged_kernels}[package].__all__
    allowed = {package, *(f"{package}.{name}" for name in public)}
    for path in (ROOT / "eval").rglob("*.py"):
        if path.stem in ("tune_kernels", "bench_decode_parts"):
            continue  # the tables of the kernels' settings, and kernels that are part of the engine
        found = {m for m in imports(path) if m.partition(".")[0] == package}
        # The kernel benchmark also times the launcher that a call would not choose on this device.
        assert found <= allowed | (LAUNCHERS if path.stem == "bench_kernels_calls" else set()), path


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
    out = run_fresh("import torch, hf_paged, hf_paged_kernels\n" + STARTED + TINY_LLAMA + STARTED)
    assert out.splitlines() == ["[]", "False", "[1, 5]", "[]", "False"]


def test_importing_the_kernels_alone_needs_neither_transformers_nor_triton():
    out = run_fresh("import hf_paged_kernels; print([name in sys.modules for name in ('transformers', 'triton')])")
    assert out.strip() == "[False, False]"


def test_importing_hf_paged_imports_no_triton():
    """transformers' model classes import torch._dynamo, and that triton: whatever they import first is not ours."""
    out = run_fresh(
        "from transformers import DynamicCache, GenerationMixin, PreTrainedModel\n"
        "from transformers import modeling_flash_attention_utils, masking_utils\n"
        "before = {name for name in sys.modules if name.partition('.')[0] == 'triton'}\n"
        "import hf_paged\n"
        "print({name for name in sys.modules if name.partition('.')[0] == 'triton'} - before)\n"
    )
    assert out.strip() == "set()"


def test_hub_kernels_are_still_absent_or_whole():
    """A bare ``kernels/`` folder on the path must not look like the hub-kernel package to transformers."""
    out = run_fresh(
        "import importlib.metadata as metadata\n"
        "from transformers.utils import is_kernels_available\n"
        "installed = any(d.name == 'kernels' for d in metadata.distributions())\n"
        "print(is_kernels_available() and not installed)\n"
    )
    assert out.strip() == "False"


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


def test_one_version():
    assert pyproject_values("version") == [f'"{hf_paged.__version__}"']


def test_the_wheel_holds_the_two_packages():
    assert '["hf_paged", "kernels/hf_paged_kernels"]' in pyproject_values("packages")


def pyproject_values(key: str) -> list[str]:
    return re.findall(rf"^{key} = (.+)$", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
