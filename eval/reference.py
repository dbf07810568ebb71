"""Published perplexities, and a command that checks a real model against them where the hub can be reached.

    python -m eval.reference                       # the table of eval/reference.md
    python -m eval.reference --check gpt2-large-512 # load the model, score the data in its convention, compare

Exit status 0: within the tolerance, 1: not, 2: bad arguments, or model or data that cannot be reached.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from eval import command_line
from eval.loading import DTYPES
from eval.perplexity import main as perplexity_main

GUIDE = "https://github.com/huggingface/transformers/blob/main/docs/source/en/perplexity.md"
EFFICIENT_QAT = "https://github.com/OpenGVLab/EfficientQAT (README, model zoo)"


@dataclass(frozen=True, slots=True)
class Published:
    """A figure somebody else has measured.

    Attributes:
        model: of the hub.
        data: as `--data` takes it.
        convention, window, stride: of `eval.quality.windows`.
        dtype: of the weights, "float16" where the source says fp16.
        ppl: as published.
        tolerance: relative; half a unit of the last digit published, and what other versions and devices differ by.
        source: where it stands.
    """

    model: str
    data: str
    convention: str
    window: int
    stride: int
    dtype: str
    ppl: float
    tolerance: float
    source: str


def _gptq(model: str, ppl: float) -> Published:
    return Published(model, "wikitext-2", "gptq", 2048, 2048, "float16", ppl, 0.01, EFFICIENT_QAT)


PUBLISHED = {
    # The guide's loop weighs its windows a little differently: see eval/quality/windows.py.
    "gpt2-large-512": Published(
        "openai-community/gpt2-large", "wikitext-2", "hf", 1024, 512, "float32", 16.45, 0.01, GUIDE
    ),
    "llama-2-7b": _gptq("meta-llama/Llama-2-7b-hf", 5.47),
    "llama-2-13b": _gptq("meta-llama/Llama-2-13b-hf", 4.88),
    "llama-2-70b": _gptq("meta-llama/Llama-2-70b-hf", 3.32),
    "llama-3-8b": _gptq("meta-llama/Meta-Llama-3-8B", 6.14),
    "llama-3-70b": _gptq("meta-llama/Meta-Llama-3-70B", 2.85),
}


def markdown() -> str:
    """The table, as eval/reference.md has it."""
    lines = [
        "# Published perplexities\n",
        "Figures that others have published, with everything that decides them; conventions as "
        "`eval/quality/windows.py` has them. Written by `python -m eval.reference`. A real model is held against its "
        "figure by\n",
        "```bash\npython -m eval.reference --check llama-2-7b --attn paged_flash --path paged_prefill\n```\n",
        "where the hub can be reached. The tolerance is relative, and covers the digits published and what versions "
        "and devices differ by.\n",
        "| name | model | data | convention | window | stride | dtype | perplexity | tolerance | source |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {item.model} | {item.data} | {item.convention} | {item.window} | {item.stride} | {item.dtype} | "
        f"{item.ppl} | {item.tolerance:.0%} | {item.source} |"
        for name, item in PUBLISHED.items()
    ]
    return "\n".join(lines) + "\n"


def check(
    name: str,
    *,
    attn: str = "paged_flash",
    path: str = "prefill",
    model: str | None = None,
    data: str | None = None,
    dtype: str | None = None,
    batch_size: int = 1,
    device_map: str | None = None,
) -> tuple[bool, str]:
    """Whether the perplexity measured here is the published one, and a line that says so.

    Args:
        name: of `PUBLISHED`.
        attn, path, batch_size, device_map: as for `eval.perplexity`.
        model: a local copy, in place of the hub's.
        data: a local copy, as `name@path`.
        dtype: in place of the published one.

    Raises:
        ValueError: an unknown name, or model or data that cannot be reached.
    """
    if name not in PUBLISHED:
        raise ValueError(f"check (--check) {name!r} is unknown; pass one of {tuple(PUBLISHED)}")
    item = PUBLISHED[name]
    arguments = [
        "--model", model or item.model, "--data", data or item.data, "--convention", item.convention, "--window",
        str(item.window), "--stride", str(item.stride), "--dtype", dtype or item.dtype, "--attn", attn, "--path", path,
        "--batch-size", str(batch_size),
    ]  # fmt: skip
    report = perplexity_main([*arguments, *(["--device-map", device_map] if device_map else [])])
    ppl = report["results"][0]["ppl"]
    difference = float("inf") if ppl is None else ppl / item.ppl - 1
    passed = abs(difference) <= item.tolerance
    return passed, (
        f"{'PASS' if passed else 'FAIL'}: {name}, {attn} {path}: {ppl} here, {item.ppl} published, relative difference "
        f"{difference:+.2%}, tolerance {item.tolerance:.0%} ({item.source})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = command_line.make_parser("reference", __doc__)
    parser.add_argument("--check", metavar="NAME", help=f"one of {', '.join(PUBLISHED)}")
    parser.add_argument("--attn", default="paged_flash", help="attention implementation")
    parser.add_argument("--path", default="prefill", help="as of eval.perplexity")
    parser.add_argument("--model", help="a local copy of the model")
    parser.add_argument("--data", help="a local copy of the data, such as wikitext-2@wiki.test.parquet")
    parser.add_argument("--dtype", choices=DTYPES, help="in place of the published one")
    parser.add_argument("--batch-size", type=command_line.positive_int, default=1, help="windows in a forward")
    parser.add_argument("--device-map", help='"auto" for a model larger than a device')
    parser.add_argument("--output", type=command_line.output_file, help="write the table to this file")
    args = parser.parse_args(argv)
    if args.check is None:
        print(markdown(), end="")
        if args.output is not None:
            args.output.write_text(markdown(), encoding="utf-8")
        return 0
    passed, line = check(
        args.check, attn=args.attn, path=args.path, model=args.model, data=args.data, dtype=args.dtype,
        batch_size=args.batch_size, device_map=args.device_map,
    )  # fmt: skip
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    command_line.run(main)
