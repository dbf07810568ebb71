"""A step of the model: its inputs, its cache, its captured graphs."""
