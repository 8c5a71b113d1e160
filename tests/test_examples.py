"""The examples for launchers: schemas and parsers of their systems accept them.

And our own command line accepts what they start. Stubs named like srun or ssh note
their arguments: what stands in a script is what runs.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dockerfile
import kubernetes_validate
import pytest
import yaml
from conftest import small_recipe
from kubeflow_trainer_api import models
from torch.distributed.run import get_args_parser

import samestep
from samestep import Placement, Run
from samestep.cli import main, worker
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


EXAMPLES = Path(__file__).parents[1] / "examples"
KUBERNETES = "1.37"
STUB = """#!{python}
import json, os, sys
with open(os.environ["NOTES"], "a") as notes:
    notes.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
{then}
"""


def objects(name: str) -> list[dict[str, Any]]:
    text = (EXAMPLES / "kubernetes" / name).read_text()
    return list(yaml.safe_load_all(text))


def container(pods: dict[str, Any]) -> dict[str, Any]:
    (only,) = pods["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def compose() -> dict[str, Any]:
    text = (EXAMPLES / "docker-compose.yaml").read_text()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def accept(argv: list[str]) -> dict[str, Any]:
    """Parse `samestep ...` or `torchrun ...`, which accept nothing else."""
    program, *arguments = argv
    group = main.cli
    if program == "torchrun":
        parsed = get_args_parser().parse_args(arguments)
        assert (parsed.module, parsed.training_script) == (True, "samestep.worker")
        group, arguments = worker.workers, parsed.training_script_args
    command, *options = arguments
    return group.commands[command].make_context(command, options).params


def is_valid(found: dict[str, Any]) -> bool:
    """Return whether the schema knows all fields and all values have their types."""
    if found["apiVersion"] == "trainer.kubeflow.org/v1alpha1":
        model = getattr(models, f"TrainerV1alpha1{found['kind']}")
        known: bool = model.from_dict(found).to_dict() == found
        return known
    try:
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "found",
    [*objects("indexed-job.yaml"), *objects("trainjob.yaml")],
    ids=lambda found: found["kind"],
)
def test_a_kubernetes_object_fits_its_schema_which_would_notice_a_typo(
    found: dict[str, Any],
) -> None:
    assert is_valid(found)
    assert not is_valid({**found, "spec": {**found["spec"], "typo": 1}})


def test_pods_find_each_other_by_the_name_of_the_service() -> None:
    service, _, _, job = objects("indexed-job.yaml")
    name, spec = job["metadata"]["name"], job["spec"]
    pods = spec["template"]
    asked = accept(["samestep", *container(spec)["args"]])
    (port,) = service["spec"]["ports"]
    domain = service["metadata"]["name"]
    assert pods["spec"]["subdomain"] == domain
    assert asked["rdzv_endpoint"] == f"{name}-0.{domain}:{port['port']}"
    assert service["spec"]["selector"].items() <= pods["metadata"]["labels"].items()


def test_a_trainjob_starts_torchrun_with_our_worker() -> None:
    runtime, _, _, job = objects("trainjob.yaml")
    trainer = job["spec"]["trainer"]
    asked = accept([*trainer["command"], *trainer["args"]])
    assert asked["recipe"] == "mnist-mlp"
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]


def test_docker_compose_fits_its_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]
    file = EXAMPLES / "docker-compose.yaml"
    subprocess.run([*check, "vendor.compose-spec", file], check=True)
    services = compose()["services"]
    for service in services.values():
        asked = accept(["samestep", *shlex.split(service["command"])])
        assert asked["rdzv_endpoint"].partition(":")[0] in services
        volume = service["volumes"][0].partition(":")[2]
        assert asked["out"].is_relative_to(volume)


def test_the_dockerfile_ends_with_our_command() -> None:
    *_, last = dockerfile.parse_file(str(EXAMPLES / "Dockerfile"))
    assert (last.cmd, last.value) == ("ENTRYPOINT", ("samestep",))


@pytest.mark.parametrize("script", ["slurm.sbatch", "two_hosts.sh"])
def test_a_shell_script_is_sound(script: str) -> None:
    subprocess.run(["bash", "-n", EXAMPLES / script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", EXAMPLES / script], check=True)


Stubs = Callable[[dict[str, str]], dict[str, str]]


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    """`stubs({name: code})`: an environment in which these programs note their calls.

    `code` is what they do then, in Python.
    """

    def make(programs: dict[str, str]) -> dict[str, str]:
        directory = tmp_path / "bin"
        directory.mkdir()
        for name, then in programs.items():
            code = STUB.format(python=sys.executable, name=name, then=then)
            (directory / name).write_text(code)
            (directory / name).chmod(0o755)
        path = f"{directory}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "NOTES": str(tmp_path / "notes")}

    return make


def calls(environment: dict[str, str], program: str) -> list[list[str]]:
    """Return the calls that have been noted."""
    notes = Path(environment["NOTES"])
    lines = notes.read_text().splitlines() if notes.exists() else []
    return [call for call in map(json.loads, lines) if call[0] == program]


def test_two_hosts_are_told_the_same_command(stubs: Stubs, tmp_path: Path) -> None:
    remote = "import subprocess; subprocess.run(['bash', '-c', sys.argv[-1]])"
    environment = stubs({"ssh": remote, "samestep": ""})
    arguments = ["node-a", "node-b", "10.0.0.0/24", "mnist-mlp", "--set", "a.b=c d"]
    script = [str(EXAMPLES / "two_hosts.sh"), *arguments]
    subprocess.run(["bash", *script], env=environment, cwd=tmp_path, check=True)
    reached = {call[2] for call in calls(environment, "ssh")}
    assert reached == {"node-a", "node-b"}
    one, other = calls(environment, "samestep")
    assert one == other
    asked = accept(one)
    assert (asked["rdzv_endpoint"], asked["interface"]) == (
        "node-a:29400",
        "10.0.0.0/24",
    )
    assert asked["assignments"] == ("a.b=c d",)


SLURM = {
    "scontrol": "if sys.argv[1] == 'show': print('node-a', 'node-b', sep='\\n')",
    "srun": "command = sys.argv[sys.argv.index('samestep'):]\n"
    "os.execvp(command[0], command)",
    "scancel": "import signal; pid = int(open(os.environ['NOTES'] + '.pid').read())\n"
    "os.kill(pid, signal.SIGUSR1)",
}
STOPS = """import signal
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(os.environ["NOTES"] + ".pid", "w").write(str(os.getpid()))
print("ready", flush=True); signal.pause()"""
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "samestep",
    "SLURM_JOB_NODELIST": "node-[a-b]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "4",
}


def test_a_slurm_job_that_is_stopped_is_queued_again(stubs: Stubs) -> None:
    environment = stubs({**SLURM, "samestep": STOPS}) | JOB
    script = ["bash", str(EXAMPLES / "slurm.sbatch"), "mnist-mlp", "--epochs", "4"]
    with subprocess.Popen(
        script, env=environment, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGUSR1)
        assert job.wait(60) == 75
    (started,) = calls(environment, "samestep")
    asked = accept(started)
    assert (asked["nodes"], asked["rdzv_endpoint"]) == ("2", "node-a:29400")
    assert (asked["workers"], asked["epochs"]) == (4, 4)
    assert calls(environment, "scancel") == [["scancel", "--signal=USR1", "7.0"]]
    assert calls(environment, "scontrol")[-1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize("code", [0, 75])
def test_a_slurm_job_that_ends_by_itself_is_not(stubs: Stubs, code: int) -> None:
    environment = stubs({**SLURM, "samestep": f"sys.exit({code})"}) | JOB
    script = ["bash", str(EXAMPLES / "slurm.sbatch")]
    assert subprocess.run(script, env=environment, check=False).returncode == code
    assert ["scontrol", "requeue", "7"] not in calls(environment, "scontrol")


def test_sbatch_understands_the_options_of_the_script(tmp_path: Path) -> None:
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm's sbatch is not installed")
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=test\nSlurmctldHost=localhost\nAuthType=auth/none\n"
        "MessageTimeout=1\nNodeName=localhost\nPartitionName=all Nodes=ALL\n"
    )
    check = ["sbatch", "--verbose", "--test-only", str(EXAMPLES / "slurm.sbatch")]
    environment = os.environ | {"SLURM_CONF": str(conf)}
    done = subprocess.run(check, env=environment, capture_output=True, text=True)
    options = dict(
        line.removeprefix("sbatch: ").split(":", 1)
        for line in done.stderr.splitlines()
        if line.count(" : ") == 1
    )
    said = {name.strip(): value.strip() for name, value in options.items()}
    assert (said["signal"], said["requeue"]) == ("B:USR1@90", "requeue")
    assert (said["nodes"], said["ntasks-per-node"]) == ("2", "1")


def test_ray_trains_the_same_weights(server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(small_recipe().to_toml())
    example = [str(EXAMPLES / "ray_train.py"), "--workers", "2", "--run", "by-ray"]
    command = [sys.executable, *example, "recipe.toml", "--no-report"]
    with TemporaryDirectory(prefix="ray-") as short:  # for the paths of its sockets
        own = os.environ | {"HOME": short, "RAY_TMPDIR": short}
        subprocess.run(command, cwd=tmp_path, env=own, check=True)
    where = Placement(workers=1, out=tmp_path / "plain")
    plain = samestep.train(small_recipe(), where, view=SilentView(), server=server)
    by_ray = Run.open(tmp_path / "by-ray")
    assert by_ray.weights_sha256 == plain.weights_sha256
    assert by_ray.result["placement"]["workers"] == 2
