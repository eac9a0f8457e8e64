"""The record of one call of the model: which layers acted, and the source's K/V."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


@dataclass
class CallRecord:
    """What happened during one call of the model.

    Attributes:
        fired: Names of the layers that fused or recorded K/V.
        captured: The source's K/V by layer; "layer#n" for the later calls of a layer that acts several times.
        passed_over: Lengths (query, key) of attention calls that are not attention layers.
        cut: Pairs (original, cut to the computed tokens) of tables and masks, by the original's id and a number.
        first: The network that was called first, by its id.
        entered: 1 once a block of a narrowed call has run; or the attention calls of an interleaved source so far.
        turns: How often each layer has acted.
    """

    fired: set[str] = field(default_factory=set)
    captured: dict[str, KeyValue] = field(default_factory=dict)
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    first: int = 0
    entered: int = 0
    turns: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        vars(self).update(vars(CallRecord()))
