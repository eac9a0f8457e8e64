"""The record of one call of the model: which layers acted, and the source's K/V."""

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
        entered: A block of a narrowed call has run.
    """

    fired: set[str] = field(default_factory=set)
    captured: dict[str, KeyValue] = field(default_factory=dict)
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    entered: bool = False
    _turns: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        for part in (self.fired, self.captured, self.passed_over, self.cut, self._turns):
            part.clear()
        self.entered = False

    def turn(self, layer: str) -> int:
        """Count a call of the layer, and return how often it acted before."""
        self._turns[layer] = self._turns.get(layer, -1) + 1
        return self._turns[layer]

    @property
    def repeated(self) -> str | None:
        """The name of a layer that acted more than once, or None."""
        return next((layer for layer, turns in self._turns.items() if turns), None)

    def latest(self) -> dict[str, KeyValue]:
        """The last captured K/V of each layer, by plain name."""
        return {name.partition("#")[0]: kept for name, kept in self.captured.items()}
