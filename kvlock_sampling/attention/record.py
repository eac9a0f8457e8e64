"""The record of one call of the model: which layers acted, and the source's K/V that they saw."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


@dataclass
class CallRecord:
    """What happened during one call of the model.

    Attributes:
        fired: Names of the layers that fused or recorded K/V.
        captured: The source's K/V by layer; of a layer that acts several times in a call, each time by "layer#n".
        passed_over: Lengths (query, key) of attention calls that are not attention layers.
        cut: Tables and masks that were cut to the computed tokens, by the identity of the original and a number. The
            original is kept beside the cut one, so that its identity stays unique.
    """

    fired: set[str] = field(default_factory=set)
    captured: dict[str, KeyValue] = field(default_factory=dict)
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    cut: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget everything: the call is made again."""
        for part in (self.fired, self.captured, self.passed_over, self.cut, self._turns):
            part.clear()

    def turn(self, layer: str) -> int:
        """How often the layer has acted before in this call."""
        count = self._turns.get(layer, 0)
        self._turns[layer] = count + 1
        return count

    @property
    def repeated(self) -> str | None:
        """The name of a layer that acted more than once, if there is one."""
        return next((layer for layer, turns in self._turns.items() if turns > 1), None)

    def latest(self) -> dict[str, KeyValue]:
        """The captured K/V by the plain names of their layers: the last ones of a layer that acted several times."""
        return {name.partition("#")[0]: kept for name, kept in self.captured.items()}
