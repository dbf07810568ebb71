"""Fused forwards for live modules: found by pattern, compared with the modules' own, in place while an engine runs.

Read in this order: :mod:`fuse` (the whole), :mod:`weights` (several as one matrix), :mod:`forwards` (what runs),
:mod:`stand_ins` (in which thread), :mod:`recording`, :mod:`patterns` and :mod:`verification` (how it is found,
and shown to be the same).
"""

from .fuse import FusedModel, fuse_model
from .stand_ins import has_own_forward, runs_another_forward, standing_in

__all__ = ["FusedModel", "fuse_model", "has_own_forward", "runs_another_forward", "standing_in"]
