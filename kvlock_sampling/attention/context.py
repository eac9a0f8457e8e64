"""What one call of the model fuses, as an immutable value, and the record of what it did.

Three modes:
- lockstep: the source rides as the last `batch` rows of the edit's call; nothing is stored.
- capture: the call is the source alone; its K/V are recorded.
- inject: the call is the edit alone; recorded K/V are fused in.
Rows come in chunks of `batch` clips, for example [uncond, cond] or [uncond, cond, source].
"""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from ..masks.tokens import Grid, Selection
from ..types import AttentionError
from .fuse import fuse, fuse_rows, join_kept
from .record import CallRecord, KeyValue


class CapturedError(BaseException):
    """Nothing more is needed of the source's pass. Its block ends here, and must not take this for a failure."""


Mode = Literal["lockstep", "capture", "inject"]


@dataclass(frozen=True)
class FusionContext:
    """What the attention layers do in one call of the model.

    Attributes:
        mode: See the module.
        ratio: Fusion ratio, (batch, tokens), in [0, 1]; 0 on edited tokens. See `fuse.fusion_ratio`.
        grid: The tokens' (time, height, width).
        selection: Capture and inject K/V of these tokens only; None for all tokens.
        narrow: In inject mode the call runs on the computed tokens of the selection only.
        source: The K/V to inject, by layer name.
        text: Number of text tokens in this call; None if unknown.
        text_first: Text tokens stand before the video's.
        rows: Rows of this call, those of each branch together; None if unknown.
        left: Attention calls until nothing more is needed of the source; None if unknown, or its prediction is read.
        called: Rows with which the network was called, if it is known and guides itself or another does; 0 if unknown.
        record: What happened.
    """

    mode: Mode
    ratio: Tensor
    grid: Grid | None = None
    selection: Selection | None = None
    narrow: bool = False
    source: Mapping[str, KeyValue] = field(default_factory=dict)
    text: int | None = None
    text_first: bool = False
    rows: int | None = None
    called: int = 0
    left: int | None = None
    record: CallRecord = field(default_factory=CallRecord)

    @property
    def narrowed(self) -> Selection | None:
        """The selection whose computed tokens are the only ones in this call; None if all tokens are in it."""
        return self.selection if self.narrow and self.mode == "inject" else None

    def fresh(self, mode: Mode, source: Mapping[str, KeyValue] | None = None) -> "FusionContext":
        """The same context for another call, in this mode, with its own record."""
        left = self.left if mode == "lockstep" else None
        return replace(self, mode=mode, source=source or {}, rows=None, record=CallRecord(), left=left)

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor) -> KeyValue:
        """Handle one attention call: the key and value to use instead of these, (rows, ..., length, dim), after norm
        and rotary embedding, with the video's tokens from `start` on. A layer that runs row by row is "name[clip]".
        """
        batch, rows = len(ratio), len(key)
        # A model may double its rows itself, to guide. Only folded heads, which leave three axes, look the same.
        unfolded = self.rows or (0 if self.called % batch else self.called) or rows
        if rows % (self.rows or batch) or (key.ndim == 3 and rows != unfolded):
            wanted = f"{unfolded} for" if unfolded != rows else "a multiple of"
            raise AttentionError(
                f"layer {layer!r} was called with {rows} rows; expected {wanted} the batch of {batch} clip(s), in "
                "chunks of whole batches, e.g. torch.cat([x, x]) for guidance.\n  Give heads an axis of their own, "
                "(rows, heads, length, dim). If the model runs its rows one by one: one clip, and batched=False."
            )
        turn = self.record.turns[layer]
        self.record.turns[layer] += 1
        video = slice(start, start + ratio.shape[1])
        # A guided denoiser may run several chunks of the source. All have the same prompt: the last one serves.
        last = key[-batch:, ..., video, :], value[-batch:, ..., video, :]
        if self.mode == "capture":
            if self.left == 0:
                raise AttentionError(f"layer {layer!r} acts once more than in the evaluation before; foreground=False.")
            self.record.fired.add(layer.partition("[")[0])
            if (chosen := self.selection) is not None:
                stored = chosen.stored.to(key.device)  # a model may lie on several devices
                last = last[0].index_select(-2, stored), last[1].index_select(-2, stored)
            self.record.captured[f"{layer}#{turn}" if turn else layer] = last
            if len(self.record.captured) == self.left:
                raise CapturedError
            return key, value
        if (source := last if self.mode == "lockstep" else self._source(layer, turn)) is None:
            return key, value  # the source's pass skipped this layer, e.g. through a step cache
        self.record.fired.add(layer.partition("[")[0])
        edit_rows = rows - batch if self.mode == "lockstep" else rows

        def fused(own: Tensor, kept: Tensor) -> Tensor:
            if self.narrowed is not None:
                return join_kept(own, kept, self.ratio, self.narrowed, start)
            if self.selection is not None and self.mode == "inject":
                stored, out = self.selection.stored, own.clone()
                where = stored.to(own.device) + start
                out[..., where, :] = fuse(own[..., where, :], kept, ratio[:, stored])
                return out
            return fuse_rows(own, kept, ratio, video, edit_rows)

        return fused(key, source[0]), fused(value, source[1])

    def _source(self, layer: str, turn: int) -> KeyValue | None:
        """The source's K/V for this turn of the layer. If the layer acted less often for the source, as a single branch
        does beside a guided model's two, its last K/V serve the other turns.
        """
        names = (*(f"{layer}#{n}" for n in range(turn, 0, -1)), layer)
        if (name := next((name for name in names if name in self.source), None)) is None and self.narrow:
            raise AttentionError(
                f"layer {layer!r} has no K/V of the source: its pass never reached this layer. Is a step cache on?\n"
                "  Disable it (transformer.disable_cache()), or pass foreground=False to KVLock."
            )
        return None if name is None else self.source[name]


acting: ContextVar[FusionContext | None] = ContextVar("kvlock_fusion_context", default=None)


def current() -> FusionContext:
    """The context of the call that is running."""
    context = acting.get()
    assert context is not None
    return context
