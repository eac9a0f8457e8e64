"""The benchmark's plain form of the paper against the lock: the same where it must be, another where it must be."""

import torch
from fuse_before_norm import ends_agree, evaluation, keys, make_setting


@torch.no_grad()
def test_both_forms_agree_at_the_ends_and_differ_between():
    setting = make_setting(scenes=1, steps=2)
    apart, free = ends_agree(setting)
    assert free.shape == setting.task.source.shape
    assert max(apart.values()) < 1e-4
    between, end = evaluation(setting, 0.5, 4.0), evaluation(setting, 1.0, 4.0)
    assert end["forms apart"] < 1e-5 < end["effect of the lock"]
    assert 1e-5 < between["forms apart"] < between["effect of the lock"]


@torch.no_grad()
def test_blends_of_normed_keys_are_shorter():
    setting = make_setting(scenes=1, steps=2)
    layers = keys(setting, 0.5, 4.0)
    assert len(layers) == 6
    # In the first layer nothing is mixed yet: background keys are the source's own.
    assert abs(layers[0]["shorter"]) < 1e-4
    assert all(layer["shorter"] > layers[0]["shorter"] for layer in layers[1:])
    assert layers[-1]["shorter"] > 3 * abs(layers[0]["shorter"])
    assert all(abs(layer["apart"]) < 1e-5 for layer in keys(setting, 1.0, 4.0))
