"""How much of the longest tests runs: all of it before a release, by ``make test-all`` (``HF_PAGED_TESTS=all``)."""

import os

WORD = os.environ.get("HF_PAGED_TESTS", "")
if WORD not in ("", "all"):
    raise ValueError(f"HF_PAGED_TESTS={WORD!r}: only 'all' is accepted; without it the longest tests do less")
EVERYTHING = WORD == "all"
