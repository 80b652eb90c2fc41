"""Processes that tests start and look at later."""

import subprocess
import tempfile


class Started(subprocess.Popen):
    """A process whose output goes to files, so that it never waits for someone to read it.

    A pipe holds 64 KiB: a launcher of runs that fail again and again prints more than that.
    """

    def __init__(self, command, stderr=None, **options):
        # Opened to append: processes that outlive this one go on writing after `communicate` has read.
        self._out = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._err = None
        if stderr is None:
            self._err = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        super().__init__([*command], stdout=self._out, stderr=stderr or self._err, **options)

    def communicate(self, input=None, timeout=None):
        """(stdout, stderr) once it has ended; what it has started may still run. stderr: None if it is in stdout."""
        assert input is None
        self.wait(timeout)
        return _all_of(self._out), self._err and _all_of(self._err)


def _all_of(file):
    file.seek(0)
    return file.read()
