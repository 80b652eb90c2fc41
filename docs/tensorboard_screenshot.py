"""Takes the screenshots of TensorBoard in docs/images.

    python docs/tensorboard_screenshot.py runs/quickstart docs/images

Needs Chromium (apt-get install chromium). TensorBoard listens only on this machine, and the browser contacts no other.
Fails if a page shows no curve.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from lcm_ds.distributed.environment import free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# picture → page
PAGES = {
    "tensorboard": "#custom_scalars&_smoothingWeight=0",
    "tensorboard_scalars": "#scalars&_smoothingWeight=0&tagFilter="
    + quote("loss/(train|validation)$|optim/(lr|grad_norm)$|val/(cosine|l2)$", safe=""),
}
WIDTH, HEIGHT = 1500, 850  # pixels
CURVE = (255, 112, 67)  # TensorBoard's colour of the first run
FEWEST = 500  # pixels of that colour in a page with curves
START_SECONDS, PAGE_SECONDS = 60, 20


def main(run: Path, output: Path) -> None:
    """Write the screenshots of a run into the folder `output`."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    output.mkdir(parents=True, exist_ok=True)
    with _tensorboard(run) as address:
        for name, page in PAGES.items():
            picture = output / f"{name}.png"
            _take(browser, f"{address}/{page}", picture)
            pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
            curve = int((abs(pixels - CURVE).max(axis=-1) < 16).sum())
            if curve < FEWEST:
                sys.exit(f"{picture}: shows no curve ({curve} pixels of its colour)")
            print(f"{picture}: {curve} pixels of curves")


@contextmanager
def _tensorboard(run: Path) -> Iterator[str]:
    """The address of a TensorBoard that has loaded a run."""
    port = free_port()
    shows = ["--logdir_spec", f"{run.name}:{run / 'tensorboard'}"]
    command = [sys.executable, "-m", "tensorboard.main", *shows, "--host", "127.0.0.1", "--port", str(port)]
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                if any(json.load(answer).values()):
                    yield address
                    return
            time.sleep(0.5)
        sys.exit(f"{run}: TensorBoard shows no scalars after {START_SECONDS} s")
    finally:
        process.terminate()
        process.wait()


def _take(browser: str, address: str, picture: Path) -> None:
    """Take a screenshot of a page after PAGE_SECONDS of the browser's virtual time."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}",
            f"--virtual-time-budget={1000 * PAGE_SECONDS}", f"--screenshot={picture}", address,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        sys.exit(f"{browser}: {done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("output", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    main(arguments.run, arguments.output)
