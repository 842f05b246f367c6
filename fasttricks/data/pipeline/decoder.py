"""DALI at work: jobs in, pixels out, batches ahead of the training."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from nvidia.dali import pipeline_def
from nvidia.dali.tensors import TensorCPU, TensorListCPU

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.draws import Draws, alternating_flip, image_draws
from fasttricks.data.pipeline.feed import Job
from fasttricks.data.pipeline.graph import image_graph, training_inputs
from fasttricks.data.pipeline.lent import Lent
from fasttricks.data.pipeline.pixels import Pixels
from fasttricks.system.failures import card_failed
from fasttricks.system.process import threads_per_rank


class DecodeError(RuntimeError):
    """DALI failed on a batch, in its own words; the decoder is of no more use."""


class Decoder:
    """A DALI pipeline of batches up to `batch_size`, for jobs of one image or more. Cost: 0.1 s to build.

    pixels: how training images are made; None: those of validation. half: float16 images, else float32. ahead: batches that
    are under way at once, 1 or more: hand over so many, `begin`, and then hand over one for each that you take.
    hw_decoder_load: as Loader.
    """

    def __init__(
        self,
        config: DataConfig,
        pixels: Pixels | None,
        *,
        device: torch.device,
        half: bool,
        seed: int,
        batch_size: int,
        ahead: int,
        hw_decoder_load: float,
    ) -> None:
        self._config, self._pixels, self._half, self._seed = config, pixels, half, seed
        on_gpu = device.type == "cuda"
        self._pipeline = pipeline_def(image_graph)(
            config,
            pixels,
            on_gpu=on_gpu,
            half=half,
            hw_decoder_load=hw_decoder_load,
            batch_size=batch_size,
            num_threads=config.threads or threads_per_rank(),
            device_id=(device.index or 0) if on_gpu else None,
            prefetch_queue_depth=ahead,
        )
        with _no_word_on_unused_libraries():
            self._pipeline.build()
        self._under_way: deque[tuple[Draws | None, dict[str, Any]]] = deque()
        """Each job's random numbers and the buffers handed over for it, which DALI does not copy."""
        self._lent = Lent()

    def hand_over(self, job: Job) -> None:
        """Give it the next job."""
        files = [TensorCPU(np.frombuffer(file, np.uint8)) for file in job.encoded]
        # not one copy of all, which takes ten times as long; the list keeps the files
        listed = TensorListCPU(files, contiguous=False)  # type: ignore[call-overload]  # DALI's stubs lack the argument
        inputs: dict[str, Any] = {"encoded": listed}
        draws = None
        if self._pixels is not None:
            draws = image_draws(self._seed, 0 if self._config.fixed_augmentation else job.epoch, job.places)
            if self._config.alternate_flip:
                draws = draws._replace(flip=alternating_flip(self._seed, job.epoch, job.places))
            inputs |= training_inputs(self._config, self._pixels, draws)
        self._under_way.append((draws, inputs))
        for name, values in inputs.items():
            self._pipeline.feed_input(name, values)

    def run(self) -> None:
        """Start on the batches handed over; the first time on all `ahead` of them."""
        self._pipeline.schedule_run()

    def take(self) -> torch.Tensor:
        """The images of the first job that was not taken, normalised, (N, 3, S, S), channels-last in memory.

        In memory of their own; on the CPU in DALI's, which it does not use again while they are there. Waits for DALI, and not
        for torch's stream. Raises DecodeError.
        """
        outputs = self._outputs()
        draws, inputs = self._under_way.popleft()
        lent = torch.from_dlpack(outputs.as_tensor())
        if self._pixels is None or draws is None:
            images = lent.permute(0, 3, 1, 2)
            if images.device.type == "cuda":  # until when it is read, the caller alone knows
                images = images.clone()
        else:
            images = self._pixels.finish(lent, self._config, draws, half=self._half)
        self._lent.hold(lent)
        del inputs  # not before DALI is done with them
        self._pipeline.release_outputs()
        return images

    def decodes(self, job: Job) -> bool:
        """Whether a job of one image can be decoded, by a decoder that nothing was handed over to.

        This decoder is of no more use if it cannot.
        """
        self.hand_over(job)
        try:
            self.run()
            self._outputs()
        except RuntimeError as error:
            if card_failed(error):
                raise
            return False
        self._pipeline.release_outputs()
        self._under_way.clear()
        return True

    def _outputs(self) -> Any:
        try:
            (outputs,) = self._pipeline.share_outputs()
        except RuntimeError as error:
            if card_failed(error):  # no fault of an image
                raise
            raise DecodeError(str(error)) from error
        return outputs


@contextmanager
def _no_word_on_unused_libraries() -> Iterator[None]:
    """Within, DALI warns neither of cuFFT 11 nor of NPP 12, CUDA 12's, where the first GPU pipeline of a process is built.

    Their packages are 201 and 282 MB, and a torch of CUDA 13 brings neither. Only spectrograms, remap, debayer and the
    old colour twist call them among DALI's operators, and none of these is in our graphs (graph.py).
    """
    with warnings.catch_warnings():
        for library in ("cuFFT", "NPP"):
            warnings.filterwarnings(
                "ignore", f".*no longer shipped with CUDA runtime.* {library} is typically", Warning
            )
        yield
