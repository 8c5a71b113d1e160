"""Scripts of other projects' documentation: exact at 1, 2 and 3 processes?

    python benchmarks/examples/run.py --LIBRARY DIR [NAME ...]

LIBRARY is accelerate, lightning or transformers. DIR is examples/ of a checkout of
Accelerate, or examples/pytorch/ of one of the others. A copy of each script is changed
as scripts.py says and run with data, models and tokenizers made in place (material.py,
standins.py). Needs datasets, evaluate, timm, torchvision and jsonargparse besides the
extras `accelerate`, `lightning` and `transformers`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from material import make_files, make_models, make_pets
from scripts import SCRIPTS, Script


HERE = Path(__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DEADLINE = 900.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerate", type=Path)
    parser.add_argument("--lightning", type=Path)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    print("| script | changed lines | result |\n|---|---|---|")
    for script in SCRIPTS:
        source = getattr(options, script.library)
        if source and (not options.names or script.name in options.names):
            print(row(script, source / script.path, options.processes), flush=True)


def row(script: Script, source: Path, processes: list[int]) -> str:
    """Run a script with each number of processes, and compare."""
    results = []
    for number in processes:
        with tempfile.TemporaryDirectory() as place:
            found, changes = run(script, source, number, Path(place))
        if isinstance(found, str):
            return f"| {script.name} | {changes} | {number}: {found} |"
        results.append(found)
    different = [
        name
        for name in ("weights", "metrics", "printed")
        if any(result[name] != results[0][name] for result in results)
    ]
    said = f"{', '.join(different)} differ" if different else "equal"
    few = ", ".join(f"{name} {len(each)}" for name, each in results[0].items())
    return f"| {script.name} | {changes} | {said} ({few}) |"


def run(
    script: Script, source: Path, processes: int, place: Path
) -> tuple[object, int]:
    """Return what all processes have found, or why a script has failed."""
    changed, changes = script.changed(source.read_text(), processes)
    (place / script.name).write_text(f"import standins\n{changed}")
    (place / "out").mkdir()
    make_material(script.library, place)
    given = [each.replace("{processes}", str(processes)) for each in script.arguments]
    is_torchrun = script.library != "lightning" and processes > 1
    start = [*TORCHRUN, str(processes)] if is_torchrun else []
    ended = subprocess.run(
        [sys.executable, *start, script.name, *given],
        cwd=place,
        env=environment(script.library, place, source.parent),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    if ended.returncode:
        return reason(ended.stderr), changes
    every = [json.loads(path.read_text()) for path in (place / "out").iterdir()]
    assert len(every) == processes, ended.stderr
    assert all(each["weights"] == every[0]["weights"] for each in every)
    return json.loads((place / "out" / "0.json").read_text()), changes


def make_material(library: str, place: Path) -> None:
    if library == "transformers":
        make_files(place)
        make_models(place)
    else:
        make_pets(place / "pets")


def environment(library: str, place: Path, beside: Path) -> dict[str, str]:
    """Return where a script finds the stand-ins, and the modules beside it."""
    own = {
        "EXAMPLE_OUT": str(place / "out"),
        "EXAMPLE_LIBRARY": library,
        "HF_HOME": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE}:{beside}:{os.environ.get('PYTHONPATH', '')}",
    }
    return {**os.environ, **own}


def reason(stderr: str) -> str:
    """Return the last error that is not torchrun's."""
    lines = [line for line in stderr.splitlines() if "Error: " in line]
    own = [line for line in lines if "ChildFailedError" not in line]
    return (own or stderr.splitlines()[-3:] or ["no message"])[-1].strip()


if __name__ == "__main__":
    main()
