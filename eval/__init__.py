"""Commands that measure hf_paged through its public names: perplexity, benchmarks and reports."""
