"""Parts of ``python -m eval.bench_engine``."""
