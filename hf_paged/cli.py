"""The command ``hf-paged``: reports for issues, a check of this machine, compiled kernels, a server,
lm-evaluation-harness."""

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from . import __version__
from .doctor import check_kernels, check_model
from .engine import Engine
from .errors import UnsupportedModelError
from .serve.command import add_serve_parser, serve_command
from .transformers_internals import TESTED

TESTED_VERSIONS = {"transformers": TESTED, "torch": ("2.11", "2.14"), "triton": ("3.6", "3.9")}
"""The oldest and the newest versions that tests were run on."""
OTHERS = ("numpy", "accelerate", "peft", "lm_eval", "trl", "datasets", "tokenizers")
VARIABLES = ("HF_PAGED_GLUON", "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 where a check fails, 2 for a bad argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["lm-eval"]:
        return _run_lm_eval(arguments[1:])
    parser = _make_parser()
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    if options.command == "env":
        print("\n".join(describe_environment()))
        return 0
    if options.command == "warm-up":
        return _warm_up(parser, options.model)
    if options.command == "serve":
        return serve_command(parser, options)
    try:
        device = torch.empty(0, device=options.device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        parser.error(f"--device {options.device!r} cannot be used here: {str(error).splitlines()[0]}")
    if options.weights and options.model is None:
        parser.error("--weights needs --model")
    if options.model is not None:
        try:
            return 0 if check_model(options.model, options.weights, device, _say) else 1
        except (ValueError, OSError, ImportError, UnsupportedModelError) as error:
            parser.error(f"--model {options.model!r}: {' '.join(str(error).split())}")
    if device.type == "cpu" and "TRITON_INTERPRET" not in os.environ:
        # Triton reads it as it is imported, which has happened.
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "hf_paged.cli", *arguments], env=environment).returncode
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter on the CPU, float32"
    _say(f"kernels on {where}, beside their PyTorch references:")
    passed = check_kernels(device, _say)
    _say("PASS: every kernel agrees with its reference" if passed else "FAIL: do not trust results from this machine")
    return 0 if passed else 1


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-paged", description=__doc__)
    parser.add_argument("--version", action="version", version=f"hf_paged {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("env", help="versions, GPU, tested ranges, compiled kernels: what an issue report needs")
    doctor = commands.add_parser(
        "doctor", help="check the kernels, or a model, on this machine",
        description="Compares each kernel with its PyTorch reference on this machine, in under a minute. With --model: "
        "says what of a model would be paged, fused and captured, or why it is refused.",
    )  # fmt: skip
    doctor.add_argument("--model", metavar="PATH", help="folder or hub id of a model (default: check the kernels)")
    doctor.add_argument(
        "--weights", action="store_true", help="load the model and start an engine (default: read its config alone)"
    )
    doctor.add_argument("--device", help="torch device (default: cuda if there is one, else cpu)")
    warm = commands.add_parser(
        "warm-up", help="compile the kernels of a model into the cache folder, for later processes or other machines",
        description="Loads a model onto the GPU, and compiles and captures what an engine with default options needs. "
        "What was compiled stays in Triton's cache folder (TRITON_CACHE_DIR), which machines with the same GPU and the "
        "same versions can share, or an image can contain.",
    )  # fmt: skip
    warm.add_argument("--model", metavar="PATH", required=True, help="folder or hub id of a model")
    add_serve_parser(commands)
    commands.add_parser(
        "lm-eval", add_help=False, help='the command of lm-evaluation-harness, with "hf-paged" among its models'
    )
    return parser


def _warm_up(parser: argparse.ArgumentParser, path: str) -> int:
    if not torch.cuda.is_available():
        parser.error("warm-up needs a CUDA GPU that torch can use: kernels are compiled for it")
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="paged_flash").cuda()
        logging.enable_progress_bar()
        with Engine(model) as engine:
            num_graphs = engine.warm_up(progress=True)
    except (ValueError, OSError, ImportError, UnsupportedModelError) as error:
        parser.error(f"--model {path!r}: {' '.join(str(error).split())}")
    _say(f"{num_graphs} steps can be captured; their kernels are in {kernel_cache()}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _run_lm_eval(arguments: list[str]) -> int:
    try:
        from . import lm_eval_model
    except ImportError as error:
        print(f"hf-paged lm-eval: error: {error}", file=sys.stderr)
        return 2
    sys.argv = ["hf-paged lm-eval", *arguments]
    lm_eval_model.main()
    return 0


def describe_environment() -> list[str]:
    """Lines of ``hf-paged env``."""
    python = f"{platform.python_version()}, {platform.platform()}"
    lines = [f"hf_paged          {__version__}", f"python            {python}"]
    for name, (oldest, newest) in TESTED_VERSIONS.items():
        lines.append(f"{name:17} {_version(name)} (tested: {oldest} to {newest})")
    lines += [f"{name:17} {_version(name)}" for name in OTHERS if _version(name) != "not installed"]
    lines.append(f"CUDA of torch     {torch.version.cuda or 'none'}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        lines.append(
            f"GPU {index}             {found.name}, capability {found.major}.{found.minor}, "
            f"{found.multi_processor_count} multiprocessors, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        )
    if not torch.cuda.device_count():
        lines.append("GPU               none that torch can use")
    folder = kernel_cache()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 2**20
    lines.append(f"compiled kernels  {folder}: {len(files):,} files, {size:,.1f} MiB")
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return lines


def kernel_cache() -> Path:
    """Where Triton keeps compiled kernels."""
    home = os.environ.get("TRITON_HOME") or Path.home()
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path(home) / ".triton" / "cache")


def _version(name: str) -> str:
    if name == "transformers":
        return transformers.__version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
