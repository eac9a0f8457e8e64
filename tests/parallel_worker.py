"""What every process of `test_parallel.py` runs: locked edits of small networks, cut over two processes or whole.

    python tests/parallel_worker.py FOLDER RANK

Results go to FOLDER/RANK.pt. gloo on the CPU carries the communication; diffusers' own templates do the rest. Three
things are stood in for, since diffusers counts on accelerators: how many there are; for ring attention a kernel that
also returns the log-sum-exp of its scores (torch has one for the CPU, which diffusers' native backend does not use);
and gathering pieces of unequal size, which gloo cannot.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from networks import random_network
from torch import Tensor
from toy_pipelines import tiny_pipeline

import kvlock_sampling as kv
from kvlock_sampling.utils.extras import hide_broken_torchvision

hide_broken_torchvision()

CASES: dict[str, tuple[str, tuple[int, int, int], dict[str, Any]]] = {
    "wan, ulysses": ("wan", (2, 2, 4), {"ulysses_degree": 2}),
    "wan, ring": ("wan", (2, 2, 4), {"ring_degree": 2}),
    "wan, ulysses, pieces of 5 and 4": ("wan", (1, 3, 3), {"ulysses_degree": 2, "ulysses_anything": True}),
    "wan, ring, pieces of 5 and 4": ("wan", (1, 3, 3), {"ring_degree": 2, "ring_anything": True}),
    "two experts, ulysses": ("wan-2.2", (2, 2, 4), {"ulysses_degree": 2}),
    "ltx, ulysses": ("ltx", (2, 2, 4), {"ulysses_degree": 2}),
    "flux, ulysses": ("flux", (1, 4, 4), {"ulysses_degree": 2}),
    "flux, ring": ("flux", (1, 4, 4), {"ring_degree": 2}),
    "qwen, ulysses": ("qwen-image", (1, 4, 4), {"ulysses_degree": 2}),
}
"""Network, grid of tokens, and how it is cut."""

SIGMAS = torch.tensor([9.0, 2.0, 0.4, 0.0])


class Edit:
    """Two clips of a random network, their sources, and a mask that is not the same in the two halves."""

    def __init__(self, name: str, grid: tuple[int, int, int]) -> None:
        self.network = random_network(name, grid=grid)
        generator = torch.Generator().manual_seed(7)
        self.source = torch.randn(self.network.x.shape, generator=generator)
        self.mask = torch.zeros(2, 1, *self.source.shape[2:])
        rows = self.source.shape[-2]
        for clip in range(2):
            self.mask[clip, ..., clip : rows // 2 + 1, :3] = 1
        if self.source.ndim == 5:
            self.mask[:, :, -1, : rows // 2] = 1
        cond = self.network.extra_args["cond"]
        if "text" in cond:  # an even number of text tokens: those are cut, too, by some plans
            cond = {k: torch.cat([v, v[:, :1]], 1) if k in ("text", "valid") else v for k, v in cond.items()}
        if "valid" in cond:
            cond["valid"] = torch.ones_like(cond["valid"])
        self.args = {"cond": cond}
        if name == "ltx":  # its masks of the text have rows per head, which Ulysses does not cut
            self.network.layers.networks[0].register_forward_pre_hook(lambda _, args: (*args[:3], None, *args[4:]))

    def lock(self, **options: Any) -> kv.KVLock:
        given = {"source": self.source, "mask": self.mask, "layers": self.network.layers, **options}
        return kv.KVLock(self.network.denoiser, **given)

    def run(self, lock: kv.KVLock) -> Tensor:
        start = torch.randn(self.source.shape, generator=torch.Generator().manual_seed(3)) * SIGMAS[0]
        with torch.no_grad():
            return lock.sample("euler", start, SIGMAS, extra_args=self.args, disable=True)

    def results(self) -> dict[str, Any]:
        """Locked in part, locked in full, and by a policy that measures; what that decided; and not locked."""
        measured = self.lock(policy=kv.Linear(), threshold=0.05, composite=False)
        return {
            "half": self.run(self.lock(policy=kv.Constant(lock=0.5), composite=False)),
            "apart": self.run(self.lock(policy=kv.Constant(lock=0.5), composite=False, batched=False)),
            "full": self.run(self.lock(policy=kv.Constant(lock=1.0))),
            "measured": self.run(measured),
            "locks": torch.stack([step.lock for step in measured.trace]),
            "free": self.run(self.lock(policy=kv.Constant(lock=0.0), composite=False)),
        }


def pipeline() -> dict[str, Any]:
    """The same inside diffusers' own pipeline."""
    pipe = tiny_pipeline("wan")
    cut(pipe.transformer, {"ulysses_degree": 2})
    shape = (1, 16, 3, 8, 8)
    source, start = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    mask = torch.zeros(1, 1, *shape[2:])
    mask[:, :, 1:, 2:6, 2:6] = 1
    with kv.diffusers.locked(pipe, source=source, mask=mask, policy="default"):
        out = pipe(
            prompt="a red square", height=64, width=64, num_frames=9, num_inference_steps=3, latents=start,
            output_type="latent",
        ).frames  # fmt: skip
    return {"latents": out}


def cut(network: Any, how: dict[str, Any], **options: Any) -> None:
    """Enable context parallelism, if there is more than one process."""
    if torch.distributed.is_initialized():
        from diffusers import ContextParallelConfig

        network.enable_parallelism(config=ContextParallelConfig(**how), **options)


def refusals() -> dict[str, str]:
    """What is said where a lock cannot take part."""
    from diffusers.models._modeling_parallel import ContextParallelOutput

    said = {}

    def ask(name: str, lock: kv.KVLock, edit: Edit) -> None:
        try:
            edit.run(lock)
        except kv.KVLockError as error:
            said[name] = str(error)

    how = {"ulysses_degree": 2}
    deaf = Edit("cogvideox", (2, 2, 4))
    cut(deaf.network.layers.networks[0], how, cp_plan={"proj_out": ContextParallelOutput(gather_dim=1)})
    ask("attention that does not communicate", deaf.lock(policy=kv.Constant(lock=1.0)), deaf)

    edit = Edit("wan", (2, 2, 4))
    before = edit.lock(policy=kv.Constant(lock=1.0))
    cut(edit.network.layers.networks[0], how)
    ask("a lock from before", before, edit)
    ask("a KV cache", edit.lock(policy=kv.Constant(lock=1.0), kv_cache=kv.KVCache()), edit)
    layers = kv.sdpa_layers(edit.network.layers.networks[0], patch=(1, 2, 2))
    ask("layers known as calls", edit.lock(policy=kv.Constant(lock=1.0), layers=layers), edit)
    extra = edit.network.layers.with_extra(after=2)
    ask("extra tokens", edit.lock(policy=kv.Constant(lock=1.0), layers=extra), edit)
    try:
        cut(random_network("wan-vace", grid=(2, 2, 4)).layers.networks[0], how)
    except ValueError as error:
        said["no plan"] = str(error)
    return said


@contextmanager
def ring_on_the_cpu() -> Iterator[None]:
    """diffusers' native backend with torch's CPU kernel, which returns the log-sum-exp that rings need."""
    import diffusers.models.attention_dispatch as dispatch

    plain = dispatch._native_attention_forward_op

    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        _, _, _, scale, _, with_lse = args
        if not with_lse:
            return plain(ctx, query, key, value, *args, **options)
        q, k, v = (part.transpose(1, 2).contiguous() for part in (query, key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    with mock.patch.object(dispatch, "_native_attention_forward_op", forward):
        yield


@contextmanager
def gathering_pieces_of_any_size() -> Iterator[None]:
    """diffusers' gathering of unequal pieces, by way of equal ones."""
    import diffusers.hooks.context_parallel as hooks

    def gather(piece: Tensor, dim: int, group: Any) -> Tensor:
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(2)]
        torch.distributed.all_gather(sizes, torch.tensor([piece.shape[dim]]), group=group)
        largest = int(torch.cat(sizes).max())
        missing = largest - piece.shape[dim]
        padded = torch.cat([piece, piece.narrow(dim, 0, 1).repeat_interleave(missing, dim)], dim).contiguous()
        pieces = [torch.empty_like(padded) for _ in range(2)]
        torch.distributed.all_gather(pieces, padded, group=group)
        return torch.cat([p.narrow(dim, 0, int(n)) for p, n in zip(pieces, sizes, strict=True)], dim)

    with mock.patch.object(hooks, "_all_gather_anything", gather):
        yield


def whole() -> dict[str, Any]:
    """Everything in one process."""
    return {name: Edit(network, grid).results() for name, (network, grid, _) in CASES.items()} | {
        "pipeline": pipeline()
    }


def cut_in_two() -> dict[str, Any]:
    """Everything again, as one of two processes."""
    found: dict[str, Any] = {}
    for name, (network, grid, how) in CASES.items():
        edit = Edit(network, grid)
        for part in edit.network.layers.networks:
            cut(part, how)
        found[name] = edit.results()
    return found | {"pipeline": pipeline(), "refusals": refusals()}


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    cpu = mock.patch.object(torch._C, "_get_accelerator", return_value=torch.device("cpu"))
    two = mock.patch.object(torch.accelerator, "device_count", return_value=2)
    with cpu, two, ring_on_the_cpu(), gathering_pieces_of_any_size():
        torch.save(cut_in_two(), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
