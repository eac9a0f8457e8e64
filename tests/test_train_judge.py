"""Training the judge: batches repeat, nothing ambiguous is asked, a killed run resumes."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from world.judge import CLASSES, Judge
from world.train_judge import MIRRORED, UNKNOWN, classes, make_batch, train

from kvlock_sampling.tiny import sample_scene
from kvlock_sampling.tiny.world import MOTIONS


def test_the_same_step_gives_the_same_batch() -> None:
    (clips, wanted), (again, wanted_again) = make_batch(3, 8), make_batch(3, 8)
    assert torch.equal(clips, again)
    assert clips.shape == (8, 3, 8, 64, 64)
    assert clips.abs().max() <= 1
    assert all(torch.equal(wanted[name], wanted_again[name]) for name in CLASSES)
    assert not torch.equal(clips, make_batch(4, 8)[0])


def test_classes_are_those_of_the_scene() -> None:
    for scene in map(sample_scene, range(40)):
        row = {name: None if i == UNKNOWN else CLASSES[name][i] for name, i in classes(scene).items()}
        assert (row["shape"], row["post"]) == (scene.shape, scene.post)
        seen = (row["colour"], row["motion"], row["glowing"])
        assert seen == ((scene.colour, scene.motion, scene.glowing) if scene.shape else (None, None, None))


def test_nothing_is_asked_of_an_object_that_is_not_there() -> None:
    wanted = make_batch(0, 64)[1]
    gone = wanted["shape"] == len(CLASSES["shape"]) - 1
    assert gone.any()
    assert (wanted["motion"][gone] == UNKNOWN).all()
    assert (wanted["glowing"][gone] == UNKNOWN).all()
    assert (wanted["post"] != UNKNOWN).all()
    assert (wanted["shape"] == UNKNOWN).any(), "a part of an object has no shape"
    assert {MIRRORED.get(name, name) for name in MOTIONS} == set(MOTIONS)


def test_a_run_resumes(tmp_path: Path) -> None:
    train(tmp_path, minutes=0.02, batch=4)
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train(tmp_path, minutes=0.08, batch=4)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert second["step"] > first["step"] > 0
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    saved = load_file(tmp_path / "judge.safetensors")
    assert all(value.dtype == torch.float16 for value in saved.values())
    Judge().load_state_dict({name: value.float() for name, value in saved.items()})
