"""Nodes that only the tests use: conditioning without a text encoder, a clip, another pack's override."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io


def schema(name: str, inputs: list[Any], output: Any) -> io.Schema:
    dev = {"is_dev_only": True} if "is_dev_only" in io.Schema.__dataclass_fields__ else {}
    return io.Schema(node_id=name, category="test", inputs=inputs, outputs=[output.Output()], **dev)


class TestText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("TestText", [io.Int.Input("seed")], io.Conditioning)

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        g = torch.Generator().manual_seed(seed)
        return io.NodeOutput([[torch.randn(1, 12, 4096, generator=g) * 0.3, {}]])


class TestClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("TestClip", [io.Int.Input("seed"), io.Int.Input("frames", default=9)], io.Image)

    @classmethod
    def execute(cls, seed: int, frames: int) -> io.NodeOutput:
        return io.NodeOutput(torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(seed)))


class TestBox(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [io.Int.Input("frames", default=9), io.Boolean.Input("speckled", default=False, optional=True)]
        return schema("TestBox", inputs, io.Mask)

    @classmethod
    def execute(cls, frames: int, speckled: bool = False) -> io.NodeOutput:
        mask = torch.zeros(frames, 64, 64)
        mask[:, :32, :32] = 1
        if speckled:  # something in every token, and not everywhere
            mask[:, ::8, ::8] = 1
        return io.NodeOutput(mask)


class TestOverride(io.ComfyNode):
    """Another pack's attention, which overwrites the slot, and computes the same."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("TestOverride", [io.Model.Input("model")], io.Model)

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = lambda f, *a, **k: f(*a, **k)
        return io.NodeOutput(clone)


class TestNoMemory(io.ComfyNode):
    """A model for whose conditions there is never room together."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("TestNoMemory", [io.Model.Input("model")], io.Model)

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        clone = model.clone()
        clone.get_free_memory = lambda device: 0
        return io.NodeOutput(clone)


class TestSlow(io.ComfyNode):
    """A model whose evaluations take a while, so that a run can be interrupted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema("TestSlow", [io.Model.Input("model")], io.Model)

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        import time

        def wait(given: dict[str, Any]) -> Any:
            time.sleep(0.5)
            return given["denoised"]

        clone = model.clone()
        clone.set_model_sampler_post_cfg_function(wait)
        return io.NodeOutput(clone)


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TestText, TestClip, TestBox, TestOverride, TestNoMemory, TestSlow]


async def comfy_entrypoint() -> ComfyExtension:
    return Extension()
