"""The small work of a decode step, fused."""
