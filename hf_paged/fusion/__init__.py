"""Fused forwards for live modules: found by pattern, proven against the modules' own, in place while an engine runs.

Read in this order: :mod:`fuse` (the whole), :mod:`weights` (views of one storage), :mod:`forwards` (what runs),
:mod:`recording`, :mod:`patterns` and :mod:`proofs` (how it is found, and shown to be the same).
"""

from .fuse import FusedModel, fuse_model

__all__ = ["FusedModel", "fuse_model"]
