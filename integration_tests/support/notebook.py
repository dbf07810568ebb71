"""Run a notebook's code cells without Jupyter, and keep what they print with them.

python integration_tests/support/notebook.py examples/first_steps.ipynb
"""

import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def printed(cell: dict[str, Any]) -> str:
    """What a code cell's outputs print."""
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def run(path: Path, cache_name: str = "cache") -> dict[str, Any]:
    """The notebook with the outputs of this run. Its folder is the working directory, as in Jupyter.

    A matplotlib figure named ``figure`` that a cell makes is the cell's picture.

    Args:
        path: of the notebook.
        cache_name: what transformers calls the argument that a model takes its cache by.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        count = 0
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code":
                continue
            count += 1
            names.pop("figure", None)
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                source = "".join(cell["source"]).replace(" cache=", f" {cache_name}=")
                exec(compile(source, f"{path.name}, cell {count}", "exec"), names)
            lines = out.getvalue().splitlines(keepends=True)
            cell["execution_count"] = count
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            if "figure" in names:
                picture = io.BytesIO()
                names["figure"].savefig(picture, format="png", dpi=70)
                cell["outputs"].append(
                    {
                        "data": {"image/png": base64.b64encode(picture.getvalue()).decode()},
                        "metadata": {},
                        "output_type": "display_data",
                    }
                )
    finally:
        os.chdir(before)
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        made = run(Path(name))
        Path(name).write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
