"""Shared by all benchmarks: parity before time, quantiles, memory, floors, one long CSV.

Every row is one number: ``op, provider, mode, metric, x_name, x, value, q20, q80,
percent_of_floor, config, ...``. Running again replaces rows of the same key. A provider whose error
against fp64 exceeds the op's tolerance gets a row ``failed`` and no time.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor

import mmfusion

# backward is timed many times on one graph, which a compiled one otherwise refuses
torch._functorch.config.donated_buffer = False
# each size compiles anew, and over the limit Dynamo goes on in eager mode
torch._dynamo.config.recompile_limit = 256
torch._dynamo.config.fail_on_recompile_limit_hit = True

FIELDS = (
    "op provider mode metric x_name x value q20 q80 percent_of_floor config gpu torch triton "
    "mmfusion commit date"
).split()
KEY = ("op", "provider", "mode", "metric", "x_name", "x", "config", "gpu")
RESULTS = Path(__file__).parent / "results"
_LARGER_THAN_L2 = 128 << 20


@dataclass
class Case:
    """One problem: inputs, what it costs at least, and how exact a result has to be.

    Attributes:
        op: Name of the op.
        x_name: The axis of the plot.
        x: The place on it.
        config: All sizes and options.
        inputs: Makes the tensors, leaves that require grad first; called afresh for each timing.
        checked: Makes those of the parity check where fp64 has no room for ``inputs``.
        truth: The op in fp64 on the same inputs.
        tolerance: Largest max |error| / max |truth|.
        flops: Of the forward pass, per mode.
        bytes: Least traffic, per mode.
    """

    op: str
    x_name: str
    x: float
    config: dict[str, Any]
    inputs: Callable[[], list[Tensor]]
    truth: Callable[..., Tensor]
    tolerance: float
    flops: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    checked: Callable[[], list[Tensor]] | None = None


@dataclass
class Rates:
    """What this device does in this run: the floor of a case follows from them."""

    flops: float
    bytes: float

    def floor_us(self, case: Case, mode: str) -> float | None:
        if mode not in case.bytes:
            return None
        return 1e6 * max(case.flops[mode] / self.flops, case.bytes[mode] / self.bytes)


class Recorder:
    """Rows of one CSV."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        if path.exists():
            with path.open() as file:
                for row in csv.DictReader(file):
                    self.rows[tuple(row[key] for key in KEY)] = row
        self.about = {
            "gpu": device_name(device),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "mmfusion": mmfusion.__version__,
            "commit": commit(),
            "date": date.today().isoformat(),
        }

    def add(self, case: Case, provider: str, mode: str, metric: str, **values: Any) -> None:
        row = dict.fromkeys(FIELDS, "") | self.about
        row |= {"op": case.op, "provider": provider, "mode": mode, "metric": metric}
        row |= {"x_name": case.x_name, "x": case.x, "config": json.dumps(case.config)}
        row |= {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
        row = {key: str(value) for key, value in row.items()}
        self.rows[tuple(row[key] for key in KEY)] = row
        shown = f"{row['value']:>10} {row['percent_of_floor']:>6}"
        print(f"{case.op:<20}{case.x_name}={case.x:<8}{provider:<22}{mode:<9}{metric:<9}{shown}")

    def save(self) -> None:
        """Written beside, then renamed: a killed run leaves the old file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        part.replace(self.path)


def measure_rates(device: str) -> Rates:
    """Matrix products of random numbers (zeros run faster) and a copy too large for any cache."""
    half = device == "cuda"
    n = 8192 if half else 1024
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if half else torch.float32)
    source = torch.randn((1 << 30) if half else (1 << 25), device=device)
    target = torch.empty_like(source)
    products, _, _ = quantiles(lambda: a @ a, device, seconds=0.5)
    copies, _, _ = quantiles(lambda: target.copy_(source), device, seconds=0.5)
    return Rates(2 * n**3 / products * 1e6, 8 * source.numel() / copies * 1e6)


def run(
    recorder: Recorder,
    case: Case,
    providers: dict[str, Callable[..., Tensor]],
    rates: Rates,
    *,
    modes: Iterable[str] = ("forward", "backward", "both"),
    seconds: float = 0.3,
    graphs: bool = True,
) -> None:
    """Check each provider, then time it in each mode; ours runs twice, as noise.

    On a GPU also from a CUDA graph, unless ``graphs`` is False: what waits for the device cannot be
    captured, and trying may leave the allocator unable to go on.
    """
    if "mmfusion" in providers:
        providers = {**providers, "mmfusion again": providers["mmfusion"]}
    bench = _Bench(recorder, case, rates, seconds)
    right = {name: provider for name, provider in providers.items() if bench.checks(name, provider)}
    for mode in modes:
        if recorder.device == "cuda":
            for name, provider in right.items():
                bench.on_gpu(name, provider, mode, graphs)
        else:
            bench.on_cpu(right, mode)
        recorder.save()


@dataclass
class _Bench:
    """Rows of one case."""

    recorder: Recorder
    case: Case
    rates: Rates
    seconds: float

    def checks(self, name: str, provider: Callable[..., Tensor]) -> bool:
        """Whether the provider is right."""
        try:
            error = parity(self.case, provider)
        except Exception as reason:  # what a provider cannot do is a result
            self.missing(name, "both", reason)
            return False
        self.recorder.add(self.case, name, "forward", "error", value=error)
        limit = self.case.tolerance
        if not error <= limit:
            self.recorder.add(self.case, name, "forward", "failed", value=f"{error:.2g} > {limit}")
        return error <= limit

    def on_gpu(self, name: str, provider: Callable[..., Tensor], mode: str, graphs: bool) -> None:
        try:
            call = _in_mode(provider, self.case.inputs(), mode)
            if call is None:
                return
            self.timed(name, mode, "eager_us", quantiles(call, "cuda", self.seconds))
            self.recorder.add(self.case, name, mode, "peak_mb", value=peak_mb(call, "cuda"))
            if graphs and mode != "backward":  # its forward ran outside of the capture
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                self.timed(name, mode, "graph_us", quantiles(graph.replay, "cuda", self.seconds))
        except Exception as reason:  # no memory, or no capture: the others go on
            self.missing(name, mode, reason)
            torch.cuda.synchronize()

    def on_cpu(self, providers: dict[str, Callable[..., Tensor]], mode: str) -> None:
        made = {name: _in_mode(x, self.case.inputs(), mode) for name, x in providers.items()}
        calls = {name: call for name, call in made.items() if call is not None}
        for name, times in _in_turns(calls, self.seconds).items():
            self.timed(name, mode, "eager_us", times)
            self.recorder.add(self.case, name, mode, "peak_mb", value=peak_mb(calls[name], "cpu"))

    def timed(self, name: str, mode: str, metric: str, times: tuple[float, float, float]) -> None:
        median, q20, q80 = times
        floor = self.rates.floor_us(self.case, mode)
        share = {} if floor is None else {"percent_of_floor": f"{100 * floor / median:.0f}"}
        self.recorder.add(self.case, name, mode, metric, value=median, q20=q20, q80=q80, **share)

    def missing(self, name: str, mode: str, reason: Exception) -> None:
        text = (str(reason).splitlines() or [""])[0][:80]
        value = f"{type(reason).__name__}: {text}"
        self.recorder.add(self.case, name, mode, "missing", value=value)


def _in_turns(
    calls: dict[str, Callable[[], Any]], seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Of a CPU, which others may be using: what disturbs one provider disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds * len(calls)
    rounds = 0
    while rounds < 7 or (time.perf_counter() < stop and rounds < 300):
        for name, call in calls.items():
            call()  # warms the caches that the others took
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
        rounds += 1
    cuts = {name: statistics.quantiles(x, n=5) for name, x in times.items()}
    return {name: (statistics.median(x), cuts[name][0], cuts[name][3]) for name, x in times.items()}


def parity(case: Case, provider: Callable[..., Tensor]) -> float:
    """Max |error| / max |truth| of the result and every gradient, against fp64."""
    inputs = (case.checked or case.inputs)()
    wide = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]
    truth, found = case.truth(*wide), provider(*inputs)
    pairs = [(found, truth)]
    leaves = [i for i, x in enumerate(inputs) if x.requires_grad]
    if leaves and truth.requires_grad:
        grad = torch.randn_like(found)
        ours = torch.autograd.grad(found, [inputs[i] for i in leaves], grad)
        theirs = torch.autograd.grad(truth, [wide[i] for i in leaves], grad.double())
        pairs += zip(ours, theirs, strict=True)
    return max(
        float((one.double() - other).abs().max() / other.abs().max().clamp(1e-3))
        for one, other in pairs
    )


def _in_mode(
    provider: Callable[..., Tensor], inputs: list[Tensor], mode: str
) -> Callable[[], Any] | None:
    leaves = [x for x in inputs if x.requires_grad]
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return provider(*inputs)

        return forward
    if not leaves:
        return None
    out = provider(*inputs)
    grad = torch.randn_like(out)
    if mode == "backward":
        return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
    return lambda: torch.autograd.grad(provider(*inputs), leaves, grad)


def quantiles(call: Callable[[], Any], device: str, seconds: float) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile in microseconds; on a GPU the L2 is emptied in between."""
    for _ in range(3):
        call()
    times = []
    if device == "cuda":
        flush = torch.empty(_LARGER_THAN_L2, dtype=torch.int8, device=device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stop = time.perf_counter() + seconds
        while len(times) < 10 or (time.perf_counter() < stop and len(times) < 500):
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
    else:
        stop = time.perf_counter() + seconds
        while len(times) < 5 or (time.perf_counter() < stop and len(times) < 500):
            start = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[3]


def peak_mb(call: Callable[[], Any], device: str) -> float:
    """Memory over what was allocated before the call."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    level = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak / 2**20


def compiled(call: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return torch.compile(call, dynamic=False, **options)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def arguments(description: str) -> argparse.Namespace:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="a folder; results/<device> if none")
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter timings")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    found = parser.parse_args()
    if found.threads:
        torch.set_num_threads(found.threads)
    if found.out is None:
        found.out = RESULTS / found.device
    torch.manual_seed(0)
    return found


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def commit() -> str:
    """Of the code at hand; outside a checkout what ``COMMIT`` says, or "none"."""
    if shutil.which("git"):
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            cwd=os.path.dirname(__file__),
        )
        if done.returncode == 0:
            return done.stdout.strip()
    return os.environ.get("COMMIT", "none")


if __name__ == "__main__":
    sys.exit("this file is imported by the benchmarks beside it")
