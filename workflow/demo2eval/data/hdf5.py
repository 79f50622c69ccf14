"""New HDF5 files that survive a full disk: the library itself ends the process with a segmentation fault where it cannot write."""

import io
from pathlib import Path

import h5py


class _Disk(io.FileIO):
    """A file that accepts everything, and keeps the first error for whoever asks."""

    error: OSError | None = None

    def __repr__(self) -> str:
        # h5py takes it for the name of the file.
        return self.name

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        written = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, self.name)
        return written

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or OSError(error.errno, error.strerror, self.name)
            return size


class NewFile(h5py.File):
    """A new HDF5 file to write into, as a context.

    Raises:
        OSError: at the end of the context, or at `check`, if something could not be written.
    """

    def __init__(self, path: Path):
        self._disk = _Disk(str(path), "w+")
        super().__init__(self._disk, "w")

    def check(self) -> None:
        """Raise the error that writing met so far, if it met one."""
        if self._disk.error is not None:
            raise self._disk.error

    def close(self) -> None:
        """Write what is left, and close."""
        super().close()
        self._disk.close()

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None:
            self.check()
