"""Execute plans on parameters, buffers, attributes and optimizer state; replay surgery records."""

from actprune.surgery.cut import cut, rehearsed
from actprune.surgery.optimizer import with_wrapped
from actprune.surgery.replay import apply_record, load_pruned, save_pruned
from actprune.surgery.transaction import Transaction

__all__ = ["Transaction", "apply_record", "cut", "load_pruned", "rehearsed", "save_pruned", "with_wrapped"]
