"""Feeds damaged and malicious bytes to every reader of `fuzz_readers`.

    python tests/fuzzing.py 100000                    so many inputs over all readers
    python tests/fuzzing.py 1 --seed 7 --only npz     one of them once more

Whatever an input holds, its reader accepts it or raises what it may; it writes nothing
outside of a run and the cache, ends within a deadline, and takes little memory. Whoever
breaks this is shown with what makes it happen again; the exit code is then 1.
"""

import argparse
import faulthandler
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import mutations
from fuzz_readers import READERS, Reader


DEADLINE_SECONDS = 120
"""By the clock, on a machine that may be busy; most inputs take 1 to 10 ms."""
MOST_MEMORY = 3 << 30
"""Above what the process has when all libraries are loaded."""
CANARY = b"sings\n"
DIRECTORIES = ("input", "here", "temporary", "home", "others")
"""The directories of each reader; Matplotlib keeps a list of fonts in its home."""
REPAIRED = 0.7
"""The share of the inputs whose sums are made right again."""


class TooSlow(BaseException):
    """An input that is not read within the deadline."""


@contextmanager
def limits() -> Iterator[None]:
    """Limit the memory of this process, and the time of an input (`deadline`)."""

    def late(*_: object) -> None:
        raise TooSlow(f"not read within {DEADLINE_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    faulthandler.enable()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_MEMORY
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Playground:
    """The directory of one reader, and what lies around it and must stay as it is."""

    def __init__(self, root: Path, reader: Reader) -> None:
        self.root, self.reader = root, reader
        self.input = root / "input"
        for name in DIRECTORIES:
            (root / name).mkdir(parents=True)
        (root / "others" / "canary").write_bytes(CANARY)
        self.read = reader.make(self.input)
        self.valid = {
            str(path.relative_to(self.input)): path.read_bytes()
            for path in sorted(self.input.rglob("*"))
            if path.is_file()
        }

    def put(self, contents: dict[str, bytes]) -> None:
        """Write these files, and remove all others."""
        shutil.rmtree(self.input)
        for name, content in contents.items():
            path = self.input / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def try_valid(self) -> None:
        """Check that the sample itself is accepted: else nothing would be tested."""
        self.read()

    def try_mutated(self, seed: int) -> str:
        """Return `accepted`, or the name of the exception that it may raise."""
        random = Random(seed)
        contents = dict(self.valid)
        name = random.choice(list(contents))
        contents[name] = mutations.mutated(name, contents[name], random)
        self.put(contents)
        if random.random() < REPAIRED:
            self.reader.repair(self.input)
        signal.setitimer(signal.ITIMER_REAL, DEADLINE_SECONDS)
        try:
            self.read()
        except self.reader.allowed as error:
            str(error).encode("utf-8", "backslashreplace")
            return type(error).__name__
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.check_surroundings()
        return "accepted"

    def check_surroundings(self) -> None:
        """Check that nothing was written but in the run and in the cache."""
        names = {path.name for path in self.root.iterdir()}
        assert names <= {*DIRECTORIES, "cache"}, names
        for empty in ("here", "temporary"):
            assert not list((self.root / empty).iterdir()), empty
        (canary,) = (self.root / "others").iterdir()
        assert canary.read_bytes() == CANARY


@contextmanager
def playing(root: Path, name: str) -> Iterator[Playground]:
    """Give a reader directories of its own, of which the current one is empty."""
    places = {"TMPDIR": "temporary", "HOME": "home", "SAMESTEP_CACHE": "cache"}
    os.environ |= {variable: str(root / place) for variable, place in places.items()}
    tempfile.tempdir = None
    playground = Playground(root, READERS[name])
    before = Path.cwd()
    os.chdir(root / "here")
    try:
        playground.try_valid()
        yield playground
    finally:
        os.chdir(before)
        shutil.rmtree(root, ignore_errors=True)


def fuzz(name: str, seeds: range, root: Path) -> tuple[Counter[str], list[str]]:
    """Return how often each end came, and what must not have happened."""
    ends, wrong = Counter[str](), []
    with playing(root / name, name) as playground:
        for seed in seeds:
            try:
                ends[playground.try_mutated(seed)] += 1
            except (Exception, TooSlow):
                ends["WRONG"] += 1
                again = f"python tests/fuzzing.py 1 --seed {seed} --only {name}"
                wrong.append(f"{again}\n{traceback.format_exc(limit=-12)}")
            if ends["WRONG"] >= 20:
                break
            if seed % 100 == 0:
                shutil.rmtree(root / name / "cache", ignore_errors=True)
    return ends, wrong


def main() -> int:
    """Return 1 if something happened that must not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(READERS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")  # libraries warn of what is odd in a file
    names = [asked.only] if asked.only else list(READERS)
    total = sum(READERS[name].share for name in names)
    failures = 0
    with tempfile.TemporaryDirectory() as directory, limits():
        for name in names:
            count = max(1, round(asked.inputs * READERS[name].share / total))
            seeds = range(asked.seed, asked.seed + count)
            ends, wrong = fuzz(name, seeds, Path(directory))
            shown = ", ".join(f"{end} {n:,}" for end, n in ends.most_common())
            print(f"{name:<18}{shown}", flush=True)
            print("\n".join(wrong), end="", file=sys.stderr, flush=True)
            failures += len(wrong)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
