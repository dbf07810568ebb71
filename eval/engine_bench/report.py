"""The report of the engine's GPU benchmark as Markdown, from its JSON alone."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

VARIANTS = {
    "graphs": "all on",
    "unfused": "fusion off",
    "eager": "graphs off",
    "plain": "fusion and graphs off",
    "compiled": "compile on",
}
"""Variants of the engine, as the tables call them."""


def markdown(report: dict[str, Any]) -> str:
    """Every part that was measured, with its roofline."""
    sizes = report["sizes"]
    low, high = sizes["lengths"]
    count = sizes["num_requests"]
    lines = [
        f"# Engine on a GPU\n\n{report['device']}, python {report['python']}, torch {report['torch']}, triton "
        f"{report['triton']}, transformers {report['transformers']}, hf_paged {report['hf_paged']}, {report['date']}; "
        f"written by `python -m eval.bench_engine --gpu`. Random weights: {report['weights']}. Rooflines are those of "
        f"an H200 (4.3 TB/s, 700 TFLOP/s). "
        f"(cut): stopped at the part's limit. Throughput and arrivals: prompts and outputs of {low} to {high:,} "
        f"tokens; all running: {count} requests of {sizes['short_prompt']} prompt tokens.",
    ]
    for section in (_speed, _switches, _sampling, _busy, _arrivals, _long, _shared, _first, _plain, _training, _prompts,
                    _jobs, _equality):
        lines += section(report["models"])
    if report.get("command"):
        lines.append(f"\nCommand: `{report['command']}`.")
    return "\n".join(lines) + "\n"


def cell(part: dict[str, Any], key: str, form: str) -> str:
    """A figure, nothing if it was not measured; that its part was cut is said."""
    value = part.get(key)
    return "" if value is None else format(value, form) + (" (cut)" if part.get("cut") else "")


def figures(part: dict[str, Any] | None, *keys: tuple[str, str]) -> list[str]:
    """Cells of a part: keys with their formats. One that failed says so in the first; rooflines are never cut."""
    if part is None:
        return [""] * len(keys)
    if "error" in part:
        said = f"failed: {part['error']}".replace("|", "/").replace("\n", " ")[:200]
        return [said, *[""] * (len(keys) - 1)]
    return [cell(part | ({"cut": False} if "roofline" in key else {}), key, form) for key, form in keys]


def _table(title: str, columns: Iterable[str], rows: list[list[str]], note: str = "") -> list[str]:
    if not rows:
        return []
    columns = list(columns)
    head = [f"\n## {title}\n", *([note + "\n"] if note else [])]
    return head + [f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows]]


def _parts(models: dict[str, Any], part: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Model, variant and figures of a part, wherever it was measured."""
    for name, entry in models.items():
        for kind, label in VARIANTS.items():
            if part in entry.get(kind, {}):
                yield name, label, entry[kind][part]


WAYS = {"throughput": "", "throughput_in_order": ", one by one"}
"""Parts of the first table, as it calls them."""


def _speed(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in models.items():
        roofline = entry["roofline"]["tokens_per_s"]
        for kind, label in VARIANTS.items():
            row = entry.get(kind, {})
            for way, suffix in WAYS.items():
                part = row.get(way)
                if part is not None:
                    speed, first = figures(part, ("tokens_per_s", ",.0f"), ("first_token_s", ".2f"))
                    share = "" if "error" in part else f"{part['tokens_per_s'] / roofline:.0%}"
                    said = f"hf_paged, {label}{suffix}"
                    rows.append([name, said, speed, share, first, f"{row['ready_s']:.1f}", _again(row)])
        rows += [[name, peer, *_peer(result, roofline)] for peer, result in entry.get("peers", {}).items()]
        if rows and rows[-1][0] == name:
            rows.append([name, "roofline", f"{roofline:,.0f}", "", "", "", ""])
    columns = (
        "model", "", "new tokens/s", "of the roofline", "first token after, s", "ready after, s",
        "ready again after, s",
    )  # fmt: skip
    return _table(
        "Throughput", columns, rows,
        "All requests at once, greedy, no eos (Python's random, seed 0): in one call of generate, which orders them "
        "and times their prompts as suits the end of the last, or one by one. First token: the mean. Ready: graphs "
        "captured and first requests served, from the weights on the card; again: a second engine of the same "
        "process, kernels compiled.",
    )  # fmt: skip


def _again(row: dict[str, Any]) -> str:
    """Seconds until the second engine of a process was ready."""
    return f"{row['again']['ready_s']:.1f}" if "ready_s" in row.get("again", {}) else ""


def _peer(result: dict[str, Any], roofline: float) -> list[str]:
    """Speed, share of the roofline and start of a peer."""
    said = figures(result | {"cut": False}, ("tokens_per_s", ",.0f"))[0]
    ready = f"{result['ready_s']:.1f}" if "ready_s" in result else ""
    if result.get("cut"):
        until = f" ({said} until then)" if said else ""
        return [f"over {result['limit_s']:.0f} s{until}", "", "", ready, ""]
    speed = result.get("tokens_per_s")
    return [said, "" if speed is None else f"{speed / roofline:.0%}", "", ready, ""]


def _switches(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, entry in models.items():
        for kind, label in VARIANTS.items():
            row = entry.get(kind, {})
            if "failure" in row:
                rows.append([name, label, f"left out: {row['failure']}", *[""] * 8])
            elif "start_s" in row:
                start = [f"{row[key]:.1f}" for key in ("start_s", "capture_s", "first_s")]
                start.append(_again(row))
                latency = figures(row.get("latency"), ("ms_per_token", ".2f"), ("roofline_ms", ".2f"))
                keys = (("step_ms", ".2f"), ("replay_ms", ".2f"), ("roofline_ms", ".2f"))
                rows.append([name, label, *start, *latency, *figures(row.get("steady"), *keys)])
    columns = (
        "model", "engine", "start, s", "graphs, s", "first requests, s", "all three again, s", "batch 1, ms a token",
        "roofline", "all running, ms a step", "replay alone, ms", "roofline",
    )  # fmt: skip
    note = (
        "The first start compiles kernels that Triton has not cached; again: a second engine of the same process. The "
        "replays come after the measured steps, at longer contexts, so they may take longer."
    )
    return _table("Decode and start", columns, rows, note)


def _sampling(models: dict[str, Any]) -> list[str]:
    keys = (("greedy_ms", ".2f"), ("step_ms", ".2f"), ("sampled_over_greedy", ".3f"))
    rows = [[name, label, *figures(part, *keys)] for name, label, part in _parts(models, "steady_sampled")]
    columns = ("model", "engine", "greedy, ms a step", "temperature 0.8, top_p 0.95", "sampled / greedy")
    return _table("Sampling", columns, rows, "All running; the same steps greedy and sampled.")


def _busy(models: dict[str, Any]) -> list[str]:
    keys = (
        ("busy", ".1%"), ("kernel_ms", ".2f"), ("step_ms", ".2f"), ("profiled_ms", ".2f"), ("queued", ".1%"),
        ("kernels", ".1%"),
    )  # fmt: skip
    rows = [[name, label, *figures(part, *keys)] for name, label, part in _parts(models, "busy")]
    columns = (
        "model", "engine", "busy", "kernels, ms a step", "ms a step", "profiled", "profile: device has work",
        "profile: kernels run",
    )  # fmt: skip
    lines = _table(
        "Busy share of steady decode", columns, rows,
        "All running, greedy. Busy: the time in which kernels run, as profiled, over the time of a step without the "
        "profiler. Of wall time inside the profile, which is longer: kernels run; device has work (gaps of up to 3 us, "
        "as they lie between kernels that depend on one another, counted).",
    )  # fmt: skip
    for name, label, part in _parts(models, "busy"):
        if "top_kernels" in part:
            gaps = ", ".join(f"{gap['us']:.0f}" for gap in part["largest_gaps"])
            kernels = [
                [f"`{k['name']}`".replace("|", "/"), str(k["count"]), f"{k['mean_us']:.2f}", f"{k['share']:.1%}"]
                for k in part["top_kernels"]
            ]
            lines += _table(
                f"Kernels of {name}, {label}", ("kernel", "count", "mean us", "of wall"), kernels,
                f"Profile of {part['steps']} steps. A kernel's time is what it adds, from the end of all that started "
                f"before it; the largest gaps: {gaps} us.",
            )  # fmt: skip
    return lines


def _arrivals(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, label, part in _parts(models, "arrivals"):
        if "error" in part:
            rows.append([name, label, *figures(part, *[("", "")] * 8)])
            continue
        for load in part["rates"]:
            ratio = load["p99_over_median"]
            rows.append(
                [name, label, f"{load['fraction']:.0%}", f"{load['requests_per_s']:.1f}",
                 f"{load['mean_running']:.0f}", f"{load['tokens_per_s']:,.0f}", _three(load["first_token_ms"]),
                 _three(load["between_tokens_ms"]), "" if ratio is None else f"{ratio:.2f}", f"{load['load_s']:.0f}"]
            )  # fmt: skip
        saturation = part["saturation"]
        rows.append(
            [name, label, "saturation" + (", other rates cut" if part["cut"] else ""),
             f"{saturation['requests_per_s']:.1f}", "all", f"{saturation['tokens_per_s']:,.0f}", "", "", "",
             f"{saturation['seconds']:.0f}"]
        )  # fmt: skip
    columns = (
        "model", "engine", "of saturation", "requests/s", "running", "tokens/s", "first token, ms: p50 / p90 / p99",
        "between tokens, ms: p50 / p90 / p99", "p99 / p50", "seconds",
    )  # fmt: skip
    note = (
        "Requests arrive at random (Poisson, seed fixed); the first third of a load is not counted. Saturation: the "
        "rate at which the engine ends requests when as many as it runs are always there."
    )
    return _table("Arrivals", columns, rows, note)


def _three(percentiles: dict[str, float] | None) -> str:
    return "" if percentiles is None else " / ".join(f"{percentiles[p]:.1f}" for p in ("p50", "p90", "p99"))


def _long(models: dict[str, Any]) -> list[str]:
    rows = []
    keys = (("prompt_s", ".2f"), ("roofline_prompt_s", ".2f"), ("step_ms", ".2f"), ("roofline_step_ms", ".2f"))
    for name, label, part in _parts(models, "long_context"):
        if "error" in part:
            rows.append([name, label, "", *figures(part, *keys)])
        for one in part.get("running", []):
            rows.append([name, label, f"{one['running']} x {part['prompt_tokens']:,}", *figures(one, *keys)])
    columns = ("model", "engine", "prompts", "all prompts, s", "roofline", "decode, ms a step", "roofline")
    return _table("Long context", columns, rows)


def _shared(models: dict[str, Any]) -> list[str]:
    rows = []
    keys = (("tokens_per_s", ",.0f"), ("seconds", ".1f"), ("prompt_tokens", ",d"))
    for name, label, part in _parts(models, "shared_prefix"):
        if "error" in part:
            rows.append([name, label, "", *figures(part, *keys)])
        for one in part.get("ways", []):
            rows.append([name, label, f"{part['prompts']} x {part['samples']}, {one['way']}", *figures(one, *keys)])
    columns = ("model", "engine", "prompts x samples", "new tokens/s", "seconds", "prompt tokens computed")
    return _table("Shared prefixes", columns, rows)


def _first(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, _, part in _parts(models, "cold"):
        if "error" in part:
            rows.append([name, "new process", *figures(part, ("", ""), ("", ""), ("", ""))])
        for one in part.get("ways", []):
            said = f"new process, {one['cache']} cache of kernels"
            rows.append([name, said, f"{one['first_s']:.2f}", _listed(one["then_s"]), ""])
    for name, _, part in _parts(models, "calls"):
        if "error" in part:
            rows.append([name, "patched", *figures(part, ("", ""), ("", ""), ("", ""))])
        for one in part.get("ways", []):
            said = "keep_awake=True" if one["keep_awake"] else "default"
            first, *then = one["seconds"]
            rows.append([name, said, f"{first:.2f}", _listed(then), f"{one['between_gib']:.2f}"])
    columns = ("model", "patched generate()", "first call, s", "equal calls after it, s", "between calls, GiB")
    return _table("Calls of a patched generate()", columns, rows, "Greedy; memory over the weights.")


def _listed(seconds: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in seconds)


IN_TURNS = "Both in turns: medians, and the median of the rounds' ratios."


def _plain(models: dict[str, Any]) -> list[str]:
    rows = _beside_sdpa(models, "plain", lambda one: f"{one['rows']} x {one['prompt']:,}")
    columns = ("model", "rows x prompt", "paged_flash, ms a token", "sdpa", "ratio")
    return _table("Plain generate()", columns, rows, "Greedy, transformers' own loop; without the prompt. " + IN_TURNS)


def _training(models: dict[str, Any]) -> list[str]:
    step = lambda one: f"{one['rows']} x {one['length']:,}{', autocast' if one['autocast'] else ''}"  # noqa: E731
    columns = ("model", "step", "paged_flash, ms", "sdpa, ms", "ratio")
    note = "Forward and backward with a loss, no optimiser. " + IN_TURNS
    return _table("Training", columns, _beside_sdpa(models, "training", step), note)


def _beside_sdpa(models: dict[str, Any], name: str, said: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    """Rows of a part whose ways have milliseconds of both; ``said`` names a way."""
    rows = []
    for model, _, part in _parts(models, name):
        if "error" in part:
            rows.append([model, *figures(part, *[("", "")] * 4)])
        for one in part.get("ways", []):
            numbers = f"{one['paged_flash']:.1f}", f"{one['sdpa']:.1f}", f"{one['ratio']:.2f}"
            rows.append([model, said(one), *numbers])
    return rows


def _prompts(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, _, part in _parts(models, "prompts"):
        if "error" in part:
            rows.append([name, *figures(part, ("", ""), ("", ""))])
        rows += [
            [name, f"{one['prompts']} x {one['length']:,}", f"{one['seconds']:.2f}"] for one in part.get("ways", [])
        ]
    return _table("Prompts with one new token each", ("model", "prompts", "seconds"), rows)


def _jobs(models: dict[str, Any]) -> list[str]:
    rows = []
    for name, _, part in _parts(models, "jobs"):
        if "error" in part:
            rows.append([name, *figures(part, ("", ""), ("", ""))])
        else:
            speeds = ", ".join(f"{part['new_tokens'] / seconds:,.0f}" for seconds in part["seconds"])
            rows.append([name, _listed(part["seconds"]), speeds])
    columns = ("model", "seconds of each job", "new tokens/s")
    return _table("Equal jobs of a new engine", columns, rows, "The requests of the throughput run, other prompts.")


def _equality(models: dict[str, Any]) -> list[str]:
    rows = []
    keys = ("engine_to_eager_bfloat16", "engine_to_eager_float32", "eager_bfloat16_to_eager_float32")
    for name, entry in models.items():
        part = entry.get("equality")
        if part is None:
            continue
        if "error" in part:
            rows.append([name, "", *figures(part, *[("", "")] * 4)])
            continue
        for kind, one in part["variants"].items():
            same = f"{one['float32_same']} of {part['requests']}"
            rows.append([name, VARIANTS[kind], same, *(_spread(one["bfloat16"][key]) for key in keys)])
        if part["cut"]:
            rows.append([name, "others: cut", *[""] * 4])
    columns = (
        "family of", "engine", "float32: requests with the same tokens", "engine to eager bfloat16",
        "engine to eager float32", "eager bfloat16 to eager float32",
    )  # fmt: skip
    note = (
        "A small model of the family with random weights: greedy tokens against those with everything off; "
        "differences of the chosen tokens' log-probabilities in bfloat16, mean / p99 / max."
    )
    return _table("The same tokens", columns, rows, note)


def _spread(differences: dict[str, float]) -> str:
    return " / ".join(f"{differences[key]:.4f}" for key in ("mean", "p99", "max"))
