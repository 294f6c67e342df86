"""The settings of a run come back as they were, and others are not silently taken."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from mmfusion.recipes.plan import Plan
from mmfusion.recipes.reporting import write_json
from mmfusion.recipes.restoring import check_resumed, restored
from mmfusion.recipes.splits import hash_split


@dataclass
class Settings:
    out: Path = Path("runs/default")
    predict: Path | None = None
    weights: Path | None = None
    encoder: str = "small"
    size: tuple[int, int, int] = (8, 8, 4)
    target: Literal["subtype", "grade"] = "subtype"
    freeze: bool = False
    resume: bool = False
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=Plan)


RUN = Settings(
    weights=Path("weights.pth"),
    size=(16, 16, 8),
    target="grade",
    plan=Plan(epochs=3, learning_rate=0.1),
)


def keep(out: Path, settings: Settings = RUN) -> Settings:
    """A later call that names the folder alone."""
    write_json(out / "config.json", {"settings": asdict(replace(settings, out=out))})
    return Settings(out=out, predict=Path("new.csv"))


def test_settings_come_back_with_their_types(tmp_path: Path) -> None:
    given = keep(tmp_path)
    assert restored(given, "predict") == replace(RUN, out=tmp_path, predict=Path("new.csv"))
    assert restored(replace(given, size=(16, 16, 8)), "predict").size == (16, 16, 8)
    assert restored(replace(given, plan=Plan(epochs=3)), "predict").plan == RUN.plan
    own = restored(replace(given, weights=Path("other.pth")), "predict", "weights")
    assert own.weights == Path("other.pth")


def test_a_run_of_another_version_has_its_settings_all_the_same(tmp_path: Path) -> None:
    settings = asdict(RUN) | {"gone": 1}
    del settings["freeze"], settings["plan"]["clip_norm"]
    settings["plan"]["lost"] = 2
    write_json(tmp_path / "config.json", {"settings": settings})
    found = restored(Settings(out=tmp_path))
    assert found == replace(RUN, out=tmp_path)


def test_what_the_run_has_not_is_refused(tmp_path: Path) -> None:
    given = replace(keep(tmp_path), encoder="resnet18")
    with pytest.raises(ValueError, match=r"encoder='resnet18', .* has 'small': .* Leave out enc"):
        restored(given, "predict")
    with pytest.raises(ValueError, match=r"epochs=4, .* has 3: "):
        restored(replace(keep(tmp_path), plan=Plan(epochs=4)), "predict")
    with pytest.raises(ValueError, match=r"config.json cannot be read .*Pass the folder of a run"):
        restored(replace(given, out=tmp_path / "nowhere"), "predict")


def test_resume_goes_on_with_the_same_settings_and_split_only(tmp_path: Path) -> None:
    split = {"train": [1, 2], "test": [3]}
    given = replace(RUN, out=tmp_path, resume=True)
    check_resumed(given, split)  # no run is there
    kept = {"settings": asdict(replace(given, resume=False)), "split_sha256": hash_split(split)}
    write_json(tmp_path / "config.json", kept)
    check_resumed(replace(given, plan=replace(RUN.plan, num_workers=2)), split)
    check_resumed(replace(given, weights=None), split, "weights")
    check_resumed(replace(given, size=(9, 9, 9), resume=False), split)
    for change, told in (
        ({"weights": None}, "weights=None, and the run in .* has .*weights.pth"),
        ({"plan": replace(RUN.plan, epochs=4)}, "epochs=4, .* has 3: .*"),
    ):
        with pytest.raises(ValueError, match=f"{told}.*Pass the same .* leave out resume"):
            check_resumed(replace(given, **change), split)
    with pytest.raises(ValueError, match=r"split_sha256=.*leave out resume"):
        check_resumed(given, {"train": [1, 3], "test": [2]})
