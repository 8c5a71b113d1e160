"""Runs all parts; see gpu.sh.

A part that fails, or is stopped at its deadline, takes nothing from the others. Ends
with exit code 1 if one has failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cleanup
import psutil
import torch

from gpu.parts import PARTS, PATIENCE, SECONDS, lanes
from gpu.report import Report
from gpu.sizes import Sizes


@dataclass
class Run:
    """One run of some parts."""

    device: str
    out: Path
    directory: Path
    """For the reports and the output of parts, until they are put together."""
    patience: int
    end: float = 0.0

    def __post_init__(self) -> None:
        """Begin to count the seconds of all parts."""
        self.end = time.monotonic() + SECONDS * self.patience

    def part(self, name: str) -> dict[str, Any]:
        """Run a part in a process of its own; return what it says."""
        part, start = PARTS[name], time.monotonic()
        if part.needs_gpu and self.device != "cuda":
            return {"status": "skipped", "message": "needs a GPU", "seconds": 0.0}
        seconds = min(part.seconds * self.patience, self.end - start)
        if seconds < 1:
            message = f"no time left of {SECONDS * self.patience} s"
            return {"status": "skipped", "message": message, "seconds": 0.0}
        file, log = self.directory / f"{name}.json", self.directory / f"{name}.log"
        command = [sys.executable, "-m", "gpu", "--device", self.device]
        command += ["--part", name, "--report", str(file)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            ending = wait(process, seconds)
        content = json.loads(file.read_text()) if file.exists() else {"status": None}
        if content["status"] is None:
            content |= {"status": "failed", "message": ending}
        return content | {"seconds": round(time.monotonic() - start, 2)}

    def parts(self, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names of parts and what they say: timed ones one by one."""
        timed = [name for name in names if PARTS[name].is_timed]
        others = [name for name in names if not PARTS[name].is_timed]
        for name in timed:
            yield name, self.part(name)
        with ThreadPoolExecutor(lanes()) as pool:
            yield from zip(others, pool.map(self.part, others), strict=True)

    def write(self, results: dict[str, dict[str, Any]]) -> None:
        """Write what is known so far as one JSON and one log."""
        content = {"device": self.device, "parts": results}
        (self.out / "gpu.json").write_text(json.dumps(content, indent=2) + "\n")
        with (self.out / "gpu.log").open("w") as log:
            for name in results:
                file = self.directory / f"{name}.log"
                text = file.read_text(errors="replace") if file.exists() else ""
                log.write(f"== {name}: {line(results[name])}\n{text}\n")


def wait(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a part; at the deadline kill it and all below. Return how it ended."""
    try:
        return f"ended with exit code {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        below = psutil.Process(process.pid).children(recursive=True)
        for one in (psutil.Process(process.pid), *below):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        return f"stopped at its deadline of {seconds:.0f} s"


def line(result: dict[str, Any]) -> str:
    """Return a result in one line."""
    message = f": {result['message']}" if "message" in result else ""
    return f"{result['status']} after {result['seconds']:.1f} s{message}"


def main() -> None:
    """Run the parts, or one of them in this process."""
    parser = argparse.ArgumentParser(prog="gpu.sh", description=main.__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        sizes = Sizes.on(options.device)
        torch.set_num_threads(1)
        Report(options.report).run(
            lambda report: PARTS[options.part].run(sizes, report)
        )
    else:
        cleanup.run(lambda: run_all(options.device, options.out, options.parts))


def run_all(device: str, out: Path, names: list[str]) -> None:
    """Run the parts, print a line for each, and write the files."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        patience = 1 if device == "cuda" else PATIENCE
        run = Run(device, out, Path(directory), patience)
        for name, result in run.parts(names):
            results[name] = result
            run.write(results)
            print(f"{name:24} {line(result)}", flush=True)
    counts = [
        f"{sum(r['status'] == status for r in results.values())} {status}"
        for status in ("passed", "failed", "skipped")
    ]
    print(f"n = {len(results)} parts: {', '.join(counts)}; {out / 'gpu.json'}")
    if any(result["status"] == "failed" for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
