"""Before the first step: is the model served, is it right, what is fused."""
