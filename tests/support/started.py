"""Processes that tests start and look at later."""

import subprocess
import tempfile


class Started(subprocess.Popen):
    """A process whose output goes to files, so that it never waits for someone to read it.

    A pipe holds 64 KiB: a launcher of runs that fail again and again prints more than that.
    """

    def __init__(self, command, **options):
        merged = options.pop("stderr", None) == subprocess.STDOUT
        files = [tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") for _ in range(2)]  # noqa: SIM115
        self._out, self._err = files[0], None if merged else files[1]
        super().__init__(command, stdout=self._out, stderr=self._err or subprocess.STDOUT, **options)

    def communicate(self, input=None, timeout=None):
        """(stdout, stderr) once it has ended; stderr is None if it goes to stdout."""
        assert input is None
        self.wait(timeout)
        return tuple(None if file is None else file.seek(0) or file.read() for file in (self._out, self._err))
