"""Real weights and real text, and the report on any model: parts of `python -m eval.real_models`."""
