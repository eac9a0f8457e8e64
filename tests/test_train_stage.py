"""Training the model of the stage: batches repeat, old weights load, a killed run resumes."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import train_stage
from world.stage_samples import sample
from world.train_stage import build_optimizers, draw_times, flow_errors, load_weights, make_batch, post_weights, train

from kvlock_sampling.tiny import TinyVideo, TinyWan
from kvlock_sampling.tiny.model import WORDS


def test_the_same_step_gives_the_same_batch() -> None:
    (clips, words), (again, words_again) = make_batch(3, 4), make_batch(3, 4)
    assert torch.equal(clips, again)
    assert torch.equal(words, words_again)
    assert not torch.equal(clips, make_batch(4, 4)[0])


def test_each_scene_comes_with_and_without_its_post() -> None:
    clips, words = make_batch(0, 8)
    pairs = words.view(4, 2, 5)
    whole = (pairs > 0).all(dim=-1).all(dim=-1)
    assert whole.any()
    assert torch.equal(pairs[whole, 0, :4], pairs[whole, 1, :4])
    assert (pairs[whole, 0, 4] == WORDS.index("with a post")).all()
    assert (pairs[whole, 1, 4] == WORDS.index("without a post")).all()
    changed = (clips[0::2] != clips[1::2]).any(dim=1).flatten(1).float().mean(dim=1)
    assert ((changed > 0) & (changed < 0.2)).all()


def test_a_share_of_the_pairs_stands_still_and_moves() -> None:
    clips, words = make_batch(0, 16, still=0.75)
    pairs = words.view(8, 2, 5)
    posts, motions = pairs[:2], pairs[2:]
    assert torch.equal(posts[:, 0, :4], posts[:, 1, :4])
    whole = (motions[..., :4] > 0).all(dim=-1).all(dim=-1)
    assert whole.any()
    still, moving = motions[whole, 0], motions[whole, 1]
    assert (still[:, 2] == WORDS.index("standing still")).all()
    assert {WORDS[i] for i in moving[:, 2].tolist()} == {"moving left", "moving right"}
    assert torch.equal(still[:, [0, 1, 3]], moving[:, [0, 1, 3]])
    middle = (clips[4::2, :, 3:5] - clips[5::2, :, 3:5]).abs().mean()
    ends = (clips[4::2, :, [0, 7]] - clips[5::2, :, [0, 7]]).abs().mean()
    assert middle < 0.5 * ends  # both pass through the same place half way


def test_the_post_and_whole_prompts_are_sometimes_left_unsaid() -> None:
    words = make_batch(0, 400)[1]
    whole = (words == 0).all(dim=1)
    assert whole.float().mean() == pytest.approx(train_stage.PROMPT_DROPOUT, abs=0.05)
    assert (words[~whole, 4] == 0).float().mean() == pytest.approx(train_stage.POST_DROPOUT, abs=0.05)
    assert (words[~whole, :4] > 0).all()


def test_times_of_the_last_pairs_have_a_spread_of_their_own() -> None:
    drawn = draw_times(40_000, 10_000, (0.6, 1.1), (1.85, 0.45), torch.Generator().manual_seed(0)).logit()
    for part, mean, std in ((drawn[:30_000], 0.6, 1.1), (drawn[30_000:], 1.85, 0.45)):
        assert float(part.mean()) == pytest.approx(mean, abs=0.03)
        assert float(part.std()) == pytest.approx(std, abs=0.03)
    same = draw_times(8, 0, (0.6, 1.1), (9.0, 9.0), torch.Generator().manual_seed(1))
    assert torch.equal(same, (0.6 + 1.1 * torch.randn(8, generator=torch.Generator().manual_seed(1))).sigmoid())


def test_errors_are_those_of_the_velocity() -> None:
    clips, noise, t = torch.zeros(2, 3, 2, 4, 4), torch.ones(2, 3, 2, 4, 4), torch.tensor([0.5, 0.02])
    off = flow_errors(lambda z, t, words: torch.full_like(z, 0.1), clips, torch.zeros(2, 5), t, noise)
    torch.testing.assert_close(off[:, 0, 0, 0, 0], torch.tensor([0.2, 1.0]))


def test_a_missing_post_is_weighed_where_it_is_missing() -> None:
    clips, _ = make_batch(0, 4)
    weights = post_weights(clips, 5.0)
    assert (weights[0::2] == 1).all()
    assert weights[1::2].unique().tolist() == [1.0, 6.0]
    same = (clips[0::2] == clips[1::2]).all(dim=1, keepdim=True)
    assert (weights[1::2][same] == 1).all()
    assert (post_weights(clips, 0.0) == 1).all()


def test_weights_of_twenty_words_load(tmp_path: Path) -> None:
    model, other = TinyWan(), TinyWan()
    old = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    old["emb.weight"] = old["emb.weight"][:20].contiguous()
    save_file(old, tmp_path / "old.safetensors")
    load_weights(other, tmp_path / "old.safetensors")
    assert torch.equal(other.emb.weight[:20], old["emb.weight"].float())
    new = other.emb.weight[20:]
    assert len(new) == len(WORDS) - 20
    assert 0.5 < new.std() / other.emb.weight[:20].std() < 1.5
    assert (new[0] - new[1]).norm() > 0.5 * new[0].norm()


def test_every_trained_parameter_has_one_optimizer() -> None:
    model = TinyWan()
    block = model.dit.blocks[0]
    block.attn1.to_k.weight.requires_grad_(False)
    muon, adamw = build_optimizers(model, 1e-3, 1e-4)
    peaks = [{id(p): group["peak"] for group in o.param_groups for p in group["params"]} for o in (muon, adamw)]
    assert not peaks[0].keys() & peaks[1].keys()
    assert len(peaks[0] | peaks[1]) == len(list(model.parameters())) - 1
    assert peaks[0][id(block.attn2.to_k.weight)] == 1e-3
    assert peaks[1][id(model.dit.proj_out.weight)] == 1e-4
    assert peaks[1][id(model.emb.weight)] == pytest.approx(1e-3)


def test_reading_only_leaves_everything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_stage, "validate", lambda *_: {"loss": 0.0})
    train(tmp_path, minutes=0.02, batch=2, reading_only=True, post_weight=1.0)
    torch.manual_seed(0)
    before, after = TinyWan().state_dict(), torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    for name, value in after.items():
        reading = any(part in name for part in ("attn2", "norm2", "text_embedder", "emb."))
        assert reading or torch.equal(value, before[name]), name
    assert not torch.equal(after["emb.weight"], before["emb.weight"])


def test_a_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = count()  # a second for every look at it: the test does not depend on the machine
    monkeypatch.setattr(train_stage, "time", SimpleNamespace(time=lambda: float(next(clock))))
    monkeypatch.setattr(train_stage, "validate", lambda *_: {"loss": 0.0})
    train(tmp_path, minutes=0.1, batch=2)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train(tmp_path, minutes=0.2, batch=2, workers=1)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    assert second["seconds"] > first["seconds"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3  # the start and the end of each run
    saved = load_file(tmp_path / "stage.safetensors")
    assert all(value.dtype == torch.float16 for value in saved.values())
    load_weights(TinyWan(), tmp_path / "stage.safetensors")


def test_samples_are_clips_that_do_not_depend_on_the_batch() -> None:
    video, prompts = TinyVideo(TinyWan()), ["a red ball", "an empty stage", "a blue box"]
    clips = sample(video, prompts, steps=2)
    assert clips.shape == (3, 3, 8, 64, 64)
    assert clips.abs().max() <= 1
    torch.testing.assert_close(sample(video, prompts, steps=2, batch=2), clips, rtol=0, atol=1e-4)
