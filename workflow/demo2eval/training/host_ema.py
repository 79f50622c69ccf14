"""The moving average of weights in the host's memory, for devices that cannot hold it.

A full-size state with its average takes 50 of an 80 GB GPU's 79 GiB, and a micro-batch is left with
nothing. The average is the part that no step reads: it only takes the weights, once per step.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

CHUNK = 2**20
THREADS = 12


class HostEma:
    """A moving average, updated by threads while the device computes.

    Attributes:
        arrays: name -> float32; whole only after `wait`.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], decay: float):
        """Take copies of the first values."""
        self.arrays = {name: np.array(array, np.float32) for name, array in arrays.items()}
        self._decay = np.float32(decay)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="ema")
        self._pending: list[Future] = []

    def update(self, params: Mapping[str, jax.Array]) -> None:
        """Begin decay * average + (1 - decay) * params, after the update before has ended."""
        self.wait()
        for name, array in self.arrays.items():
            average, new = array.reshape(-1), np.asarray(params[name]).reshape(-1)
            self._pending += [
                self._pool.submit(self._update, average[i : i + CHUNK], new[i : i + CHUNK])
                for i in range(0, average.size, CHUNK)
            ]

    def _update(self, average: np.ndarray, new: np.ndarray) -> None:
        scaled = np.multiply(new, 1 - self._decay)
        average *= self._decay
        average += scaled

    def wait(self) -> None:
        """Wait until the average is that of all weights that came."""
        for future in self._pending:
            future.result()
        self._pending.clear()
