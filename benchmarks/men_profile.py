"""Where time and memory go when a meningioma cohort of true size is read and trained on.

python benchmarks/men_profile.py                    # 200 patients: about half an hour on two cores
python benchmarks/men_profile.py --patients 30 --shape 240 240 24 --steps 2

Writes a SYNTHETIC cohort, reads it as examples/cmml_men.py does, without and with what the cache
holds by then, takes steps of its model, and writes what each part took to a JSON file of
`benchmarks/results/men_profile/`. The volumes have the size of true ones, but pack better: they
are zero outside the brain and smooth within. They were just written: no disk is waited for.
"""

import functools
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import tyro
from accelerate import Accelerator
from harness import commit

from mmfusion.missingness import hide
from mmfusion.presence import collate
from mmfusion.recipes.men_synthetic import write_synthetic_men
from mmfusion.recipes.men_table import read_patients
from mmfusion.recipes.plan import Plan
from mmfusion.recipes.reporting import versions, write_json
from mmfusion.recipes.stepping import OptimiserStep
from mmfusion.recipes.tracking import peak_memory
from mmfusion.recipes.volume_inputs import crop, normalise
from mmfusion.recipes.volumes import read_volume, tumour_box

HERE = Path(__file__).resolve().parents[1]


@dataclass
class Settings:
    """What to run."""

    patients: int = 200
    """Patients of the cohort."""
    shape: tuple[int, int, int] = (240, 240, 155)
    """Voxels of most volumes."""
    size: tuple[int, int, int] = (128, 128, 24)
    """Voxels of the tumour box."""
    batch_size: int = 8
    """Patients in an optimiser step."""
    steps: int = 8
    """Optimiser steps that are timed, after one that is not."""
    profiled: int = 20
    """Patients that are read in one thread, part by part."""
    scratch: Path | None = None
    """Keeps the cohort for another run; without it it is removed, as the cache always is."""
    out: Path = HERE / "benchmarks/results/men_profile/slices-155.json"
    """The result."""


class Clock:
    """What each part took, one number for each time: seconds, and seconds of processors.

    The latter do not hang on what else the machine is busy with.
    """

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[part].append(time.perf_counter() - wall)
        self.cpu[part].append(time.process_time() - cpu)

    def split(self, part: str, other: str, cpu: float) -> None:
        """Count so many processor seconds of the last ``part`` as those of another."""
        self.cpu[part][-1] -= cpu
        self.cpu[other].append(cpu)


def example() -> Any:
    """examples/cmml_men.py as a module: what is measured is what it does."""
    spec: Any = importlib.util.spec_from_file_location("cmml_men", HERE / "examples/cmml_men.py")
    module = sys.modules["cmml_men"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(settings: Settings, root: Path) -> None:
    """In a process of its own, whose memory does not count."""
    job = functools.partial(
        write_synthetic_men, root, num_patients=settings.patients, shape=settings.shape
    )
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(job).result()


def read_all(settings: Settings, how: Any, script: Any) -> tuple[Any, dict[str, Any]]:
    """The training split, and what it takes to read all splits, again, and to load the items."""
    clock = Clock()
    with clock("first"):
        script.read(how)
    with clock("cached"):
        train = script.read(how)[0]["train"]
    with clock("epoch"):
        for row in range(len(train)):
            train[row]
    counts = {"first": settings.patients, "cached": settings.patients, "epoch": len(train)}
    return train, {
        part: {
            "patients_per_second": round(count / clock.wall[part][0], 2),
            "cpu_seconds_per_patient": round(clock.cpu[part][0] / count, 4),
        }
        for part, count in counts.items()
    }


def read_by_part(settings: Settings, root: Path) -> dict[str, float]:
    """Processor seconds a patient; ``unpack`` is the part of ``read`` that nibabel does."""
    patients = [one for one in read_patients(root) if one.tumour is not None][: settings.profiled]
    clock = Clock()
    for patient in patients:
        with clock("tumour box"):
            box = tumour_box(patient.tumour or "", margin=5.0)
        for file in patient.files.values():
            with clock("unpack"):
                nib.load(file).get_fdata(dtype=np.float32, caching="unchanged")
            with clock("read"):
                volume = read_volume(file)
            with clock("crop"):
                part = crop(volume, box, settings.size)
            with clock("normalise"):
                normalise(part)
    return {part: round(sum(took) / len(patients), 4) for part, took in clock.cpu.items()}


def train_by_part(
    settings: Settings, how: Any, script: Any, train: Any
) -> tuple[dict[str, float], float]:
    """Processor seconds of a step by part, and patients a second of a whole one."""
    model = script.build(how, train)
    step = OptimiserStep(Accelerator(cpu=True), model, how.plan)
    model.train()
    spent: list[float] = []  # by each encoder, forward
    reached: list[float] = []  # when the gradient came to each encoder

    def begin(*_: Any) -> None:
        spent.append(-time.process_time())

    def end(module: Any, inputs: Any, features: torch.Tensor) -> None:
        spent[-1] += time.process_time()
        features.register_hook(lambda _: reached.append(time.process_time()))

    for encoder in model.edge.encoders.values():
        encoder.register_forward_pre_hook(begin)
        encoder.register_forward_hook(end)
    for number in range(settings.steps + 1):
        if number <= 1:  # the first one warms up
            clock = Clock()
        rows = [(number * settings.batch_size + i) % len(train) for i in range(settings.batch_size)]
        with clock("items and collate"):
            batch = collate([train[row] for row in rows], train.names, train.shapes)
        with clock("step"):
            step(batch, epoch=0, step=number, steps=settings.steps + 1)
        visible = hide(batch["present"], how.plan.hide_rate, torch.Generator())
        spent.clear()
        reached.clear()
        with clock("fusion and losses, forward"):
            loss = model(**batch, visible=visible).loss
        clock.split("fusion and losses, forward", "encoders, forward", sum(spent))
        with clock("fusion and losses, backward"):
            loss.backward()
            ended = time.process_time()
        clock.split("fusion and losses, backward", "encoders, backward", ended - reached[0])
        with clock("clip and optimise"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), how.plan.clip_norm)
            step.optimiser.step()
    rate = settings.batch_size / statistics.median(clock.wall["step"])
    parts = {part: round(statistics.median(took), 4) for part, took in clock.cpu.items()}
    return parts, round(rate, 2)


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory(prefix="men-profile-") as folder:
        scratch = settings.scratch or Path(folder)
        write(settings, scratch / "cohort")
        files = [path.stat().st_size for path in (scratch / "cohort/volumes").rglob("*.nii*")]
        script = example()
        plan = Plan(epochs=1, batch_size=settings.batch_size)
        with tempfile.TemporaryDirectory(dir=scratch) as cache:
            how = script.Settings(
                data_root=scratch / "cohort", size=settings.size, cache=Path(cache), plan=plan
            )
            train, reading = read_all(settings, how, script)
            memory = {"after reading": round(peak_memory(torch.device("cpu")))}
            parts = read_by_part(settings, scratch / "cohort")
            steps, rate = train_by_part(settings, how, script, train)
        memory["after training"] = round(peak_memory(torch.device("cpu")))
    found = {
        "synthetic": True,
        "reading": reading,
        "training": {"patients_per_second": rate},
        "peak_memory_mb": memory,
        "reading_cpu_seconds_per_patient": parts,
        "training_cpu_seconds_per_batch": steps,
        "files": {"count": len(files), "mb": round(sum(files) / 1e6)},
        "settings": asdict(settings),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": versions() | {"nibabel": nib.__version__},
        "commit": commit(),
        "date": date.today().isoformat(),
        "command": " ".join(["python benchmarks/men_profile.py", *sys.argv[1:]]),
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(settings.out, found)
    print(settings.out.read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
