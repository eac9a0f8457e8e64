"""Nodes that make policies: one for each of the library's, a preset, and a window around another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .common import CATEGORY, PRESETS, Policy, number, schema


def policy_node(kind: str, title: str, description: str, inputs: list[Any], ranges: tuple[str, ...] = ()) -> type:
    """A node for one policy of the library. Of `ranges` each stands for two inputs, at its ends."""

    class PolicyNode(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(
                node_id=f"KVLockPolicy{kind}",
                display_name=f"KV Lock Policy: {title}",
                category=f"{CATEGORY}/policies",
                description=description,
                inputs=inputs,
                outputs=[Policy.Output(display_name="policy")],
            )

        @classmethod
        def execute(cls, **given: Any) -> io.NodeOutput:
            from kvlock_sampling import policy
            from kvlock_sampling.integrations.comfyui import in_one_line

            for name in ranges:
                given[name] = given.pop(f"{name}_from"), given.pop(f"{name}_to")
            with in_one_line():
                return io.NodeOutput(getattr(policy, kind)(**given))

    PolicyNode.__name__ = PolicyNode.__qualname__ = f"KVLockPolicy{kind}"
    return PolicyNode


class KVLockPolicyPreset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockPolicyPreset",
            display_name="KV Lock Policy: Preset",
            category=f"{CATEGORY}/policies",
            description="A preset with its estimator and threshold, e.g. to compare several in one graph.",
            inputs=[io.Combo.Input("preset", options=list(PRESETS), default="default", tooltip="See KV Lock.")],
            outputs=[Policy.Output(display_name="policy")],
        )

    @classmethod
    def execute(cls, preset: str) -> io.NodeOutput:
        return io.NodeOutput(preset)


class KVLockPolicyWindow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="KVLockPolicyWindow",
            display_name="KV Lock Policy: Window",
            category=f"{CATEGORY}/policies",
            description="A policy between two noise levels; outside them nothing is locked.",
            inputs=[
                Policy.Input("policy"),
                number(
                    "below",
                    3.0,
                    0.0,
                    1e4,
                    "Active at sigma <= below. 0: no limit. Sigma 1 is half noise, flow time 0.5.",
                ),
                number("above", 0.0, 0.0, 1e4, "Active at sigma >= above. 0: no limit."),
            ],
            outputs=[Policy.Output(display_name="policy")],
        )

    @classmethod
    def execute(cls, policy: Any, below: float, above: float) -> io.NodeOutput:
        from kvlock_sampling import Windowed
        from kvlock_sampling.integrations.comfyui import in_one_line
        from kvlock_sampling.presets import Preset, load_preset

        with in_one_line():
            preset = load_preset(policy) if isinstance(policy, str) else policy
            inner = preset.policy if isinstance(preset, Preset) else preset
            made = Windowed(inner, below=below or None, above=above or None)
            return io.NodeOutput(replace(preset, policy=made) if isinstance(preset, Preset) else made)


SHARE = "1: the source's keys and values, 0: the edit's own."
POLICIES = [
    KVLockPolicyPreset,
    KVLockPolicyWindow,
    policy_node(
        "Constant",
        "Constant",
        "The same lock at every evaluation; nothing is measured.",
        [
            number("lock", 1.0, 0.0, 1.0, SHARE),
            number("composite", 1.0, 0.0, 1.0, "Weight of the source in the background of the prediction."),
        ],
    ),
    policy_node(
        "ReleaseBelow",
        "Release Below",
        "The background is the source's above a noise level, then free under the lock. Nothing is measured.",
        [
            number(
                "below", 3.0, 0.01, 1e4, "Noise level sigma at which the background is let go; 3 is flow time 0.75."
            ),
            number("lock", 0.5, 0.0, 1.0, SHARE),
        ],
    ),
    policy_node(
        "Release",
        "Release",
        "The background is the source's, except where the edit's own change is firm. Needs the divergence estimator.",
        [
            number("below", 3.0, 0.01, 1e4, "Nothing is let go above this noise level sigma; 3 is flow time 0.75."),
            number("lock", 0.75, 0.0, 1.0, SHARE),
            number("firm", 4.0, 1.0, 1e3, "Effect, in thresholds, at which the lock begins to weaken."),
            number("snr", 4.0, 0.0, 1e3, "Effect over variance that counts as firm. Higher lets less go."),
            io.Boolean.Input(
                "early", default=True, tooltip="Lock from the first step on, not from the first release on."
            ),
        ],
    ),
    policy_node(
        "Sigmoid",
        "Sigmoid",
        "Lock and guidance rise smoothly with risk, the measured variance over its threshold.",
        [
            number("centre", 1.0, 0.001, 1e3, "Risk at half way."),
            number("width", 0.5, 0.01, 10.0, "Width in log risk."),
            number("lock_range_from", 0.0, 0.0, 1.0, "Lock at no risk."),
            number("lock_range_to", 1.0, 0.0, 1.0, "Lock at high risk."),
            number("cfg_range_from", 1.0, 0.0, 10.0, "Multiple of the guidance scale at no risk."),
            number("cfg_range_to", 1.0, 0.0, 10.0, "Multiple of the guidance scale at high risk."),
        ],
        ranges=("lock_range", "cfg_range"),
    ),
    policy_node(
        "Threshold",
        "Threshold",
        "Locks when risk rises above a threshold, and lets go when it has fallen below a lower one.",
        [
            number("on", 1.0, 0.001, 1e3, "Risk above which to lock."),
            number("off", 0.7, 0.0, 1e3, "Risk below which to let go."),
            number("locked", 1.0, 0.0, 1.0, "Lock when locked."),
            number("free", 0.0, 0.0, 1.0, "Lock when free."),
            number("cfg_calm", 1.0, 0.0, 10.0, "Multiple of the guidance scale when free."),
            number("cfg_alarm", 1.0, 0.0, 10.0, "Multiple of the guidance scale when locked."),
        ],
    ),
    policy_node(
        "PID",
        "PID",
        "A controller that locks as much as it takes to hold risk at a target.",
        [
            number("target", 1.0, 0.001, 1e3, "Risk to hold."),
            number("kp", 0.1, 0.0, 100.0, "Proportional gain."),
            number("ki", 0.3, 0.0, 100.0, "Integral gain, per unit of log sigma."),
            number("kd", 0.0, 0.0, 100.0, "Derivative gain."),
            number("bias", 0.0, 0.0, 1.0, "Lock at zero error."),
            number("lock_range_from", 0.0, 0.0, 1.0, "Least lock."),
            number("lock_range_to", 1.0, 0.0, 1.0, "Greatest lock."),
        ],
        ranges=("lock_range",),
    ),
]
