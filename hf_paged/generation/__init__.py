"""``generate()`` of a patched model, over the engine."""
