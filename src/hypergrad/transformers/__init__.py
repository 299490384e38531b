"""A Trainer for Hugging Face's transformers that learns weights of its training data while it trains.

    w ← w − η ∇₁g,      g(w, λ) = Σ ω(λ) ℓ(w) / (number of tokens),      λ ← λ − γ dℓ_valid(w*(λ))/dλ

A small module computes the weights ω of sources, examples or tokens; a tracker of `hg.bilevel` trains the module.
"""

try:
    import accelerate as _accelerate  # noqa: F401  # pyright: ignore[reportMissingImports]
    import transformers as _transformers  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "hypergrad.transformers needs transformers and accelerate: pip install 'torch-hypergrad[transformers]'"
    ) from error

from ._trainer import BilevelTrainer, f2sa
from ._weights import ExampleWeights, SourceWeights, TokenWeights

__all__ = ["BilevelTrainer", "f2sa", "SourceWeights", "ExampleWeights", "TokenWeights"]
