"""The kernels against the usual alternatives: bytes under the interpreter, time on the CPU.

    python -m bench.kernels bytes      # ours and Liger's, by the same ledger (Liger's if liger-kernel is installed)
    python -m bench.kernels cpu        # against torch.nn.functional, alternating; medians

No GPU is timed. Bytes are a program's requests, a re-read counted again; launches are counted, and host syncs named.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 4


def bytes_report() -> str:
    """Forward and backward of cross-entropy with smoothing 0.1, bytes a row over the floor of 2 K e + 12."""
    from fasttricks_kernels import cross_entropy, cross_entropy_loss_and_grad
    from fasttricks_kernels.proof.ledger import ledger

    def pair(z: Tensor, target: Tensor) -> None:
        leaf = z.requires_grad_()
        cross_entropy(leaf, target, smoothing=0.1, ignore_index=None).backward()

    contestants: dict[str, Callable[[Tensor, Tensor], object]] = {
        "loss_and_grad": lambda z, t: cross_entropy_loss_and_grad(z, t, smoothing=0.1),
        "autograd pair": pair,
    }
    notes = []
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        for scale in (1.0, 1024.0):

            def liger(z: Tensor, target: Tensor, scale: float = scale) -> None:
                (liger_cross_entropy(z.requires_grad_(), target, label_smoothing=0.1) * scale).backward()

            contestants[f"Liger, loss scale {scale:g}"] = liger
    except ImportError:
        notes.append("Liger is not installed (pip install liger-kernel): its columns are left out.")
    lines = [
        "| K | dtype | floor, bytes a row | " + " | ".join(contestants) + " |",
        "|---|" * 1 + "---|" * (2 + len(contestants)),
    ]
    for num_classes in (10, 100, 1000, 1001):
        for dtype in (torch.float16, torch.float32):
            cells = []
            floor = 2 * num_classes * dtype.itemsize + 12
            for run in contestants.values():
                logits = torch.randn(ROWS, num_classes).to(dtype)
                with ledger() as book:
                    run(logits, torch.arange(ROWS) % num_classes)
                cells.append(f"{book.total / (ROWS * floor):.3f} x")
            lines.append(f"| {num_classes} | {str(dtype)[6:]} | {floor} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *notes])


def cpu_report(pairs: int) -> str:
    """Forward and backward on the CPU, one thread, ours and torch's in alternation: median of `pairs` ratios."""
    from fasttricks_kernels import cross_entropy, distillation_loss

    torch.set_num_threads(1)
    lines = ["| B x K | against | ours, us | theirs, us | theirs / ours |", "|---|---|---|---|---|"]
    for rows, num_classes in ((256, 1000), (256, 10), (1024, 1000)):
        logits, teacher = (torch.randn(rows, num_classes) for _ in range(2))
        logits.requires_grad_()
        a, b = torch.randint(num_classes, (2, rows))

        def dense(logits: Tensor = logits, a: Tensor = a, b: Tensor = b, k: int = num_classes) -> Tensor:
            q = 0.3 * F.one_hot(a, k).float() + 0.7 * F.one_hot(b, k).float()
            return F.cross_entropy(logits, q, label_smoothing=0.1)

        def torchs(logits: Tensor = logits, a: Tensor = a) -> Tensor:
            return F.cross_entropy(logits, a, label_smoothing=0.1)

        def with_teacher(logits: Tensor = logits, a: Tensor = a, teacher: Tensor = teacher) -> Tensor:
            soft = F.kl_div((logits / 20).log_softmax(1), (teacher / 20).softmax(1), reduction="batchmean")
            return F.cross_entropy(logits, a, label_smoothing=0.1) + 20**2 * soft

        def itself(logits: Tensor = logits, a: Tensor = a) -> Tensor:
            return F.cross_entropy(logits, a, label_smoothing=0.1)

        for name, ours, theirs in (
            ("F.cross_entropy against itself: the noise", torchs, itself),
            (
                "F.cross_entropy(label_smoothing=0.1)",
                lambda z=logits, a=a: cross_entropy(z, a, smoothing=0.1),
                torchs,
            ),
            (
                "dense soft targets under mixup",
                lambda z=logits, a=a, b=b: cross_entropy(z, a, smoothing=0.1, target_b=b, lam=0.3),
                dense,
            ),
            (
                "F.cross_entropy and F.kl_div with a teacher",
                lambda z=logits, a=a, t=teacher: distillation_loss(z, t, a, smoothing=0.1),
                with_teacher,
            ),
        ):
            times = []
            for turn in range(pairs + 3):  # who goes first alternates: the second finds memory that the first freed
                pair = {loss: _seconds(loss, logits) for loss in ((ours, theirs) if turn % 2 else (theirs, ours))}
                times.append((pair[ours], pair[theirs]))
            times = times[3:]
            ratio = statistics.median(t / o for o, t in times)
            us = [statistics.median(column) * 1e6 for column in zip(*times, strict=True)]
            lines.append(f"| {rows} x {num_classes} | {name} | {us[0]:.0f} | {us[1]:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def _seconds(loss: Callable[[], Tensor], logits: Tensor) -> float:
    """By the clock of this thread, which does all of the work: other programs do not count."""
    logits.grad = None
    start = time.thread_time()
    loss().backward()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["bytes", "cpu"])
    parser.add_argument("--pairs", type=int, default=301, help="rounds of the CPU timing")
    options = parser.parse_args()
    if options.measure == "cpu":
        print(cpu_report(options.pairs))
    elif os.environ.get("TRITON_INTERPRET") == "1":
        print(bytes_report())
    else:  # the interpreter is chosen before a kernel's module is imported
        command = [sys.executable, "-W", "ignore", "-m", "bench.kernels", "bytes"]
        subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


if __name__ == "__main__":
    main()
