"""Bilevel optimisation over minibatches: trackers, which add directions to .grad while torch.optim trains both levels.

    tracker = SOBA(params=model.parameters(), hparams=hparams, lr=0.1)
    for train_batch, valid_batch in zip(train_loader, cycle(valid_loader)):
        tracker.backward(valid_loss(valid_batch), train_loss(train_batch))
        for each in (inner_optimizer, outer_optimizer, tracker): each.step()
        for each in (inner_optimizer, outer_optimizer): each.zero_grad()

An algorithm is defined by the points at which it takes derivatives of the losses (`Oracles`), and by a linear filter.
"""

from ._data import cycle
from ._first_order import BOME, F2SA, SAMA
from ._oracles import Batch, Oracles, plus, times
from ._report import Comparison, Report
from ._second_order import SABA, SOBA, SRBA, AmIGO
from ._tracker import Directions, Tracker

__all__ = [
    "SOBA",
    "AmIGO",
    "SABA",
    "SRBA",
    "F2SA",
    "BOME",
    "SAMA",
    "cycle",
    "Report",
    "Comparison",
    # to write other trackers
    "Tracker",
    "Directions",
    "Oracles",
    "Batch",
    "plus",
    "times",
]
