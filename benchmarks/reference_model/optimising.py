"""What every training stage shares: settings, learning rate, averaged weights, checkpoints."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """One training stage's schedule."""

    steps: int
    batch: int
    """Examples of one step in each process."""

    peak_rate: float
    warmup: int = 100
    decay: float = 0.01
    average: float = 0.999
    cooldown: float = 1.0
    """Last part of the steps in which the learning rate falls linearly to zero, 0..1."""
    checkpoint_every: int = 250
    log_every: int = 50


_SHARED_FLOATS = 16_000_000


@dataclass(frozen=True)
class Exchange:
    """Memory and a meeting point shared by the processes that train together."""

    barrier: Barrier
    rows: Tensor
    """One row for each process, float32."""

    @classmethod
    def among(cls, ranks: int) -> Exchange:
        """Make the exchange of `ranks` processes, to be handed to each."""
        rows = torch.zeros(ranks, _SHARED_FLOATS)
        rows.share_memory_()  # type: ignore[no-untyped-call]
        return cls(multiprocessing.get_context("spawn").Barrier(ranks), rows)

    def mean(self, values: Tensor, rank: int) -> Tensor:
        """Return the mean over the processes of a flat float32 tensor."""
        rows = self.rows[:, : values.numel()]
        rows[rank] = values
        self.barrier.wait()
        mean = rows.mean(dim=0)
        self.barrier.wait()
        return mean


@dataclass
class Run:
    """Where and how the stages run: device, folder of the intermediate files."""

    work: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started: float = field(default_factory=time.monotonic)
    rank: int = 0
    exchange: Exchange | None = None
    """Set where several processes train together, each on its own part of every batch."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return 1 if self.exchange is None else len(self.exchange.rows)

    def meet(self) -> None:
        """Wait for the other processes."""
        if self.exchange is not None:
            self.exchange.barrier.wait()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Let process 0 run the block alone first, so that the others find its files."""
        if self.rank > 0:
            self.meet()
        yield
        if self.rank == 0:
            self.meet()

    def log(self, stage: str, message: str) -> None:
        """Print a line and add it to `work/train.log`; only process 0 does."""
        if self.rank:
            return
        line = f"[{time.monotonic() - self.started:7.0f} s] {stage}: {message}"
        print(line, flush=True)
        with (self.work / "train.log").open("a") as log:
            log.write(line + "\n")


class Average:
    """Exponential moving average of a module's parameters (buffers are left alone)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the module's parameters as they are."""
        self.decay = decay
        self.live = list(module.parameters())
        self.shadow = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the live parameters; the first steps move faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange averaged and live parameters; a second call undoes the first."""
        for live, shadow in zip(self.live, self.shadow, strict=True):
            kept = live.detach().clone()
            live.copy_(shadow)
            shadow.copy_(kept)


def optimise(
    run: Run, stage: str, module: nn.Module, settings: Settings, loss_at: Callable[[int], Tensor]
) -> Average:
    """Train `module` on `loss_at(step)` to the end of the schedule, from the last checkpoint.

    Leaves the averaged parameters in the module and returns the average.
    """
    optimiser = torch.optim.AdamW(
        _parameter_groups(module, settings.decay),
        lr=settings.peak_rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = Average(module, settings.average)
    path = run.work / f"{stage}.checkpoint.pt"
    step = _resume(path, run, module, optimiser, average)
    recent: list[float] = []
    since = time.monotonic()
    while step < settings.steps:
        _set_rate(optimiser, settings, step)
        loss = loss_at(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        _share_gradients(module, run)
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        step += 1
        average.update(step)
        recent.append(float(loss.detach()))
        if step % settings.log_every == 0 or step == settings.steps:
            pace = (time.monotonic() - since) / len(recent)
            mean = sum(recent) / len(recent)
            run.log(stage, f"step {step}/{settings.steps} loss {mean:.4f} {pace * 1e3:.0f} ms/step")
            recent, since = [], time.monotonic()
        if run.rank == 0 and (step % settings.checkpoint_every == 0 or step == settings.steps):
            _save(path, step, module, optimiser, average)
    average.swap()
    return average


@torch.no_grad()
def _share_gradients(module: nn.Module, run: Run) -> None:
    """Replace the gradients by their mean over the processes."""
    if run.exchange is None:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = run.exchange.mean(torch.cat([g.flatten() for g in gradients]), run.rank)
    parts = torch.split(flat, [g.numel() for g in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def _parameter_groups(module: nn.Module, decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _set_rate(optimiser: torch.optim.Optimizer, settings: Settings, step: int) -> None:
    """Linear warm-up, a level stretch, then the cooldown to zero."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    cool = min(1.0, (1 - step / settings.steps) / settings.cooldown)
    for group in optimiser.param_groups:
        group["lr"] = settings.peak_rate * min(warm, cool)


def _save(
    path: Path, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, average: Average
) -> None:
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimiser": optimiser.state_dict(),
        "shadow": average.shadow,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(
    path: Path,
    run: Run,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: Average,
) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, map_location=run.device, weights_only=True)
    module.load_state_dict(state["module"])
    optimiser.load_state_dict(state["optimiser"])
    with torch.no_grad():
        for shadow, saved in zip(average.shadow, state["shadow"], strict=True):
            shadow.copy_(saved)
    return int(state["step"])


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Number of parameters of all the modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())
