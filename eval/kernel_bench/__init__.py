"""Parts of ``python -m eval.bench_kernels``."""
