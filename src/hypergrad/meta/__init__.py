"""Meta-learning: one hypergradient over a batch of tasks, which are evaluated in parallel.

    f(λ) = (1/B) Σᵢ E(wᵢ(λ), λ, taskᵢ),      wᵢ(λ) ≈ argmin_w g(w, λ, taskᵢ), in T steps from w₀(λ)

Losses take one task. The same call computes implicit (iMAML), unrolled (MAML) and first-order (FOMAML, Reptile)
gradients. After adaptation torch.func.vmap(f, in_dims=(0, None, 0))(params, hparams, tasks) evaluates all tasks.

On a CPU some operations are faster under vmap if they are written differently: cross-entropy as
-logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean(), because vmap decomposes nll_loss in Python; a linear layer
as x @ weight.mT + bias, because vmap multiplies the bias by 1 first; and max_pool2d of many channels after
x.contiguous(memory_format=torch.channels_last).
"""

from ._gradient import adapt, backward, grad
from ._methods import FirstOrder, Implicit, Method, Reptile, Unrolled
from ._result import Adaptation, MetaGradient, Plan, TaskError
from ._tasks import biased

__all__ = ["grad", "backward", "MetaGradient"]  # the meta-gradient
__all__ += ["Implicit", "Unrolled", "FirstOrder", "Reptile", "Method", "biased"]  # how it is computed
__all__ += ["adapt", "Adaptation"]  # adaptation alone
__all__ += ["Plan", "TaskError"]  # how many tasks ran in parallel, and which failed
