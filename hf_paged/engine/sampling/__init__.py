"""From logits to tokens: what a request asked for, and how rows of a step get their tokens."""
