"""Placeholder until the compile branch is merged."""

from . import _compiled

Recorded = _compiled.Product
