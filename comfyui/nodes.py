"""The nodes: names, inputs and tooltips. The library is imported when a node runs, so that ComfyUI starts no slower."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io, ui

from .common import ADVANCED, CATEGORY, PRESETS, Estimator, KVCache, Lock, Policy, number, schema
from .policies import POLICIES

EDITS = ("recolour", "reshape", "remove", "insert", "glow")
ESTIMATORS = ("trajectory", "divergence", "posterior", "renoise", "dropout")


def lock_inputs() -> list[Any]:
    """What every node that makes a lock takes."""
    return [
        io.Latent.Input("source", tooltip="The clip being edited, encoded with the model's VAE."),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="White = edit; a still, or one frame for each frame of the clip. Default: the noise mask of the "
            "source, or of the latent that is sampled. The lock does the compositing in its place.",
        ),
        io.Combo.Input(
            "preset",
            options=list(PRESETS),
            default="default",
            tooltip="When to lock, and where to let go. default: composited, except where the edit's own "
            "effects are firm, such as shadows and light. full: the background's keys and values are the source's "
            "throughout. off: plain sampling.",
        ),
        Policy.Input("policy", optional=True, tooltip="A policy of your own instead of the preset."),
        io.Conditioning.Input(
            "source_prompt", optional=True, tooltip="What the clip shows before the edit. Default: the positive prompt."
        ),
        io.Noise.Input("noise", optional=True, tooltip="Noise of the source. Default: the run's own."),
        Estimator.Input("estimator", optional=True, tooltip="How uncertainty is measured. Default: the preset's."),
        KVCache.Input("kv_cache", optional=True, tooltip="Evaluate the source at some steps only: faster, not exact."),
        number(
            "threshold",
            0.0,
            0.0,
            1e6,
            "Variance at risk 1. 0: the preset's or the estimator's.",
            optional=True,
            step=1e-5,
        ),
        io.String.Input(
            "layers",
            default="all",
            optional=True,
            tooltip="Attention layers to lock, e.g. 8-16 or 0,4,8.",
            **ADVANCED,
        ),
        number(
            "transition",
            0.0,
            0.0,
            64.0,
            "Width in tokens of a band around the mask that is locked less.",
            optional=True,
        ),
        number("transition_share", 0.5, 0.0, 1.0, "The share of the lock that the band takes.", optional=True),
        io.Boolean.Input(
            "composite",
            default=True,
            optional=True,
            tooltip="Put the source into the background where the policy says nothing of it. Off: the lock alone "
            "acts there. The presets default, release and static decide it themselves.",
            **ADVANCED,
        ),
        io.Boolean.Input(
            "foreground",
            default=True,
            optional=True,
            tooltip="Compute the edited tokens alone where the background is fully locked: faster, same result.",
            **ADVANCED,
        ),
    ]


def made_lock(given: dict[str, Any]) -> Any:
    """The lock that these inputs ask for."""
    from kvlock_sampling.integrations.comfyui import ComfyLock, layer_indices

    policy = given.get("policy")
    options: dict[str, Any] = {
        "policy": given.get("preset", "default") if policy is None else policy,
        "estimator": given.get("estimator"),
        "threshold": given.get("threshold") or None,
        "layers": layer_indices(given.get("layers", "all")),
        "composite": None if given.get("composite", True) else 0.0,
        "foreground": None if given.get("foreground", True) else False,
    }
    if width := given.get("transition"):
        options["transition"] = width, given.get("transition_share", 0.5)
    return ComfyLock(
        given["source"],
        mask=given.get("mask"),
        source_prompt=given.get("source_prompt"),
        noise=given.get("noise"),
        kv_cache=given.get("kv_cache"),
        options=options,
    )


class KVLock(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLock",
            display_name="KV Lock",
            category=CATEGORY,
            description="Edit the masked part of a clip. The background takes the source's keys and values; a policy "
            "decides how much, from what is measured. Connect the model to any sampler.",
            search_aliases=["background lock", "inpaint video", "KV edit", "video edit mask"],
            inputs=[io.Model.Input("model"), *lock_inputs()],
            outputs=[
                io.Model.Output(display_name="model"),
                Lock.Output(display_name="lock", tooltip="For the trace, a second stage and compositing of pixels."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, **given: Any) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line

        with in_one_line():
            lock = made_lock(given)
            return io.NodeOutput(lock.patch(model), lock)


class KVLockContinue(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockContinue",
            display_name="KV Lock (next stage)",
            category=CATEGORY,
            description="The same lock for the next sampler of a chain, such as the low-noise model of Wan 2.2: same "
            "source, mask and noise, and the policy goes on where it was.",
            search_aliases=["wan 2.2 high low", "two experts lock"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the next stage."),
                Lock.Input("lock", tooltip="The lock of the stage before."),
            ],
            outputs=[io.Model.Output(display_name="model"), Lock.Output(display_name="lock")],
        )

    @classmethod
    def execute(cls, model: Any, lock: Any) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line

        with in_one_line():
            second = lock.next_stage()
            return io.NodeOutput(second.patch(model), second)


class KVLockSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockSampler",
            display_name="KV Lock (sampler)",
            category=CATEGORY,
            description="The lock around a SAMPLER instead of a model, for custom sampling. Use one of the two.",
            inputs=[io.Sampler.Input("sampler"), *lock_inputs()],
            outputs=[io.Sampler.Output(display_name="sampler"), Lock.Output(display_name="lock")],
        )

    @classmethod
    def execute(cls, sampler: Any, **given: Any) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line

        with in_one_line():
            lock = made_lock(given)
            return io.NodeOutput(lock.around(sampler), lock)


class KVLockTrace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockTrace",
            display_name="KV Lock Trace",
            category=CATEGORY,
            description="What was measured and done in the latest run, evaluation by evaluation, over the noise level.",
            inputs=[
                Lock.Input("lock"),
                io.Latent.Input("after", tooltip="The sampler's result, so that the trace is drawn after the run."),
            ],
            outputs=[io.Image.Output(display_name="plot"), io.String.Output(display_name="table")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lock: Any, after: Any) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line
        from kvlock_sampling.integrations.comfyui.pixels import plotted

        with in_one_line():
            image, table = plotted(lock.trace)
            return io.NodeOutput(image, table, ui=ui.PreviewImage(image, cls=cls))


class KVLockMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockMask",
            display_name="KV Lock Mask",
            category=CATEGORY,
            description="The mask on the model's token grid: what is edited (white, or the clip if an image is "
            "connected), the transition band (yellow), and what can be locked (blue). A token is edited if any pixel "
            "in it is.",
            search_aliases=["token grid", "mask preview"],
            inputs=[
                io.Model.Input("model"),
                io.Latent.Input("source"),
                io.Mask.Input("mask"),
                io.Image.Input("image", optional=True, tooltip="The clip. Edited tokens show it, the others tint it."),
                io.Int.Input("grow", default=0, min=0, max=512, optional=True, tooltip="Pixels added around the mask."),
                number("transition", 0.0, 0.0, 64.0, "Width of the transition band in tokens.", optional=True),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="The mask, grown and snapped to whole tokens."),
                io.Image.Output(display_name="preview"),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, source: Any, mask: Any, image: Any = None, grow: int = 0, transition: float = 0.0
    ) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line
        from kvlock_sampling.integrations.comfyui.pixels import token_map

        with in_one_line():
            network = model.model.diffusion_model
            snapped, preview = token_map(network, source["samples"], mask, image, grow=grow, transition=transition)
            return io.NodeOutput(snapped, preview, ui=ui.PreviewImage(preview, cls=cls))


class KVLockComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockComposite",
            display_name="KV Lock Composite",
            category=CATEGORY,
            description="Paste the original pixels outside the mask: then encoding and decoding cost the background "
            "nothing. With a lock, what its policy let go is not pasted over.",
            inputs=[
                io.Image.Input("edited"),
                io.Image.Input("original"),
                io.Mask.Input("mask"),
                io.Float.Input(
                    "feather", default=2.0, min=0.0, max=256.0, step=0.5, tooltip="Width of the blend in pixels."
                ),
                Lock.Input("lock", optional=True),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, edited: Any, original: Any, mask: Any, feather: float, lock: Any = None) -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line
        from kvlock_sampling.integrations.comfyui.pixels import pasted

        with in_one_line():
            return io.NodeOutput(pasted(edited, original, mask, feather, None if lock is None else lock.released))


class KVLockEstimator(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockEstimator",
            display_name="KV Lock Estimator",
            category=CATEGORY,
            description="How the uncertainty of the prediction is measured. trajectory: over the last steps, free. "
            "divergence: from the source's own prediction. posterior, renoise, dropout: by further passes.",
            inputs=[
                io.Combo.Input("kind", options=list(ESTIMATORS), default="trajectory", tooltip="See the description."),
                io.Int.Input(
                    "passes", default=2, min=1, max=16, tooltip="Further passes of renoise and dropout, which needs 2."
                ),
            ],
            outputs=[Estimator.Output(display_name="estimator")],
        )

    @classmethod
    def execute(cls, kind: str, passes: int) -> io.NodeOutput:
        from kvlock_sampling import variance
        from kvlock_sampling.integrations.comfyui import in_one_line

        with in_one_line():
            made = {
                "trajectory": variance.TrajectoryVariance,
                "divergence": lambda: variance.Divergence(patch="model"),
                "posterior": variance.PosteriorVariance,
                "renoise": lambda: variance.RenoiseVariance(passes=passes),
                "dropout": lambda: variance.DropoutVariance(passes=passes),
            }
            return io.NodeOutput(made[kind]())


class KVLockKVCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockKVCache",
            display_name="KV Lock Cache",
            category=CATEGORY,
            description="Evaluate the source at some steps only, and keep its keys and values in between. The cache "
            "is freed at the end of the run.",
            inputs=[
                io.Int.Input(
                    "every", default=3, min=1, max=100, tooltip="Evaluations per pass of the source, at most."
                ),
                number("ratio", 1.5, 1.0, 100.0, "Largest ratio of noise levels that share keys and values."),
                io.Combo.Input(
                    "format",
                    options=["int8", "unchanged"],
                    default="int8",
                    tooltip="int8: half the memory of bfloat16.",
                ),
                number("budget", 4.0, 0.1, 4096.0, "Memory in GB."),
            ],
            outputs=[KVCache.Output(display_name="kv_cache")],
        )

    @classmethod
    def execute(cls, every: int, ratio: float, format: str, budget: float) -> io.NodeOutput:
        settings = {"every": every, "ratio": ratio, "budget": f"{budget}GB"}
        return io.NodeOutput({**settings, "format": None if format == "unchanged" else format})


class KVLockExample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockExample",
            display_name="KV Lock Example",
            category=CATEGORY,
            description="A small model and a clip to edit, so that everything can be tried without a download. Its "
            "prompts have five parts: colour, shape, motion, surface and post, as in those that it puts out.",
            inputs=[
                io.Combo.Input("edit", options=list(EDITS), default="remove", tooltip="What happens to the object."),
                io.Int.Input("scene", default=1003, min=0, max=1_000_000, tooltip="Chooses the clip."),
                io.String.Input(
                    "prompt",
                    default="",
                    optional=True,
                    tooltip="Instead of the edit's own, e.g. a red "
                    "flower with five petals moving left, glowing, beside a post.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Vae.Output(display_name="vae", tooltip="The model's latents are pixels."),
                io.Image.Output(display_name="clip"),
                io.Mask.Output(display_name="mask"),
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Conditioning.Output(display_name="source_prompt"),
                io.Image.Output(display_name="truth", tooltip="What the edit should show."),
                io.String.Output(display_name="prompts"),
            ],
        )

    @classmethod
    def execute(cls, edit: str, scene: int, prompt: str = "") -> io.NodeOutput:
        from kvlock_sampling.integrations.comfyui import in_one_line
        from kvlock_sampling.integrations.comfyui.example import PixelVAE, conditioning, example, model

        with in_one_line():
            made = example(edit, scene)
            prompt = prompt.strip() or made.prompt
            conds = (conditioning(text) for text in (prompt, "", made.source_prompt))
            said = f"{made.source_prompt} -> {prompt}"
            return io.NodeOutput(model(), PixelVAE(), made.clip, made.mask, *conds, made.truth, said)


NODES = [
    KVLock,
    KVLockContinue,
    KVLockSampler,
    KVLockMask,
    KVLockTrace,
    KVLockComposite,
    KVLockEstimator,
    KVLockKVCache,
    KVLockExample,
    *POLICIES,
]


class KVLockExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    return KVLockExtension()
