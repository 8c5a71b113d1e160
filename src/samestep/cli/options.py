"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from samestep.errors import UsageError


Command = Callable[..., None]
Option = Callable[[Command], Command]


def _workers(value: str) -> int | str:
    """Return a positive number, or `auto`. Raises BadParameter."""
    if value == "auto":
        return value
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise click.BadParameter(
        f"workers are a positive number or `auto`; received `{value}`."
    )


def _balance(value: str) -> str | tuple[int, ...]:
    """Return a word, or a number for each worker. Raises BadParameter."""
    if value in ("auto", "off", "random"):
        return value
    parts = value.split(",")
    if all(part.isdecimal() for part in parts):
        return tuple(map(int, parts))
    raise click.BadParameter(
        "a balance is `auto`, `off`, or a number of micro-batches for each worker, "
        f"such as `5,3`; received `{value}`."
    )


def _nodes(value: str) -> str:
    """Return `N` or `MIN:MAX`, after a check. Raises BadParameter."""
    least, _, most = value.partition(":")
    numbers = [int(n) for n in (least, most or least) if n.isdecimal()]
    if len(numbers) == 2 and 0 < numbers[0] <= numbers[1]:
        return value
    raise click.BadParameter(
        "machines are a number, or the fewest and the most, such as `1:4`; "
        f"received `{value}`."
    )


def _group(*options: Option) -> Option:
    """Return a decorator that adds all the options, in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


workers_option = click.option(
    "--workers",
    type=_workers,
    metavar="N|auto",
    default="auto",
    help="Worker processes; auto: one per physical core that may be used.",
)

device_option = click.option(
    "--device",
    type=click.Choice(["cpu", "auto", "cuda"]),
    default="cpu",
    help="Device to compute on; a GPU gives other bits than a CPU, and is untested.",
)

exchange_option = click.option(
    "--exchange",
    type=click.Choice(["auto", "shared", "gloo", "nccl"]),
    default="auto",
    help="How gradients are summed; auto: in shared memory if possible, over NCCL "
    "between GPUs. With gloo, workers may share GPUs.",
)

set_option = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="a.b=value",
    help="Set a recipe field; repeatable.",
)

interface_option = click.option(
    "--interface",
    metavar="NAME|ADDRESS|NETWORK",
    help="Network interface between the machines; a network, such as 10.0.0.0/24, lets "
    "the same command run on all of them.",
)


def _user_code_option(part: str, help_text: str) -> Option:
    return click.option(
        f"--{part}",
        metavar="module:function",
        help=f"{help_text} Imported, if necessary from the current directory.",
    )


_model_option = _user_code_option(
    "model", "Your own model: a function that returns a torch.nn.Module."
)
_data_option = _user_code_option(
    "data", "Your own data: a function that returns the samples."
)
_loss_option = _user_code_option(
    "loss", "Your own loss, or a name such as squared-error."
)
_optimizer_option = _user_code_option(
    "optimizer", "Your own optimizer: a function that returns a torch.optim.Optimizer."
)
_schedule_option = _user_code_option(
    "schedule", "Your own schedule: the factor of the learning rate, for each step."
)
model_and_data_options = _group(_model_option, _data_option)
user_code_options = _group(_model_option, _data_option, _loss_option)
training_code_options = _group(user_code_options, _optimizer_option, _schedule_option)

recipe_options = _group(
    click.option("--epochs", type=int, help="Passes over the training samples."),
    click.option("--max-steps", type=int, help="Optimizer steps, instead of epochs."),
    click.option("--global-batch", type=int, help="Samples per optimizer step."),
    click.option("--micro-batches", type=int, help="Micro-batches per global batch."),
    click.option("--seed", type=int, help="Seed of weights, order and dropout."),
    click.option(
        "--skip-bad",
        is_flag=True,
        help="Skip images that cannot be read; they are listed and counted.",
    ),
)

_follow_options = _group(
    click.option(
        "--callback",
        "callbacks",
        multiple=True,
        metavar="module:Class",
        help="Your own class, whose methods the first worker calls; repeatable. "
        "Imported, if necessary from the current directory.",
    ),
    click.option(
        "--tracker",
        "trackers",
        multiple=True,
        metavar="module:function",
        help="Call this function with every record of metrics.jsonl; repeatable. It is "
        "your code that runs: the module is imported, if necessary from the current "
        "directory, which is on Python's path for this import only.",
    ),
    click.option(
        "--report/--no-report",
        "with_report",
        default=True,
        help="Write report.html at the end, if its libraries are installed (default).",
    ),
)

_placement_options = _group(
    workers_option,
    device_option,
    exchange_option,
    click.option(
        "--balance",
        type=_balance,
        metavar="auto|off|N,N,...",
        default="auto",
        help="Micro-batches per worker: by measured speed (auto), evenly (off), or as "
        "given, such as 5,3.",
    ),
    click.option(
        "--drop-stragglers-below",
        type=click.FloatRange(0, 1, max_open=True),
        default=0.0,
        help="Drop a worker slower than this fraction of the others' median speed.",
    ),
    click.option(
        "--tensorboard/--no-tensorboard",
        default=None,
        help="Write TensorBoard events; default: if tensorboardX is installed.",
    ),
    click.option(
        "--min-workers",
        type=click.IntRange(1),
        help="Fewest workers to continue with after the machine lost cores or memory.",
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=3,
        show_default=True,
        help="Restarts allowed without progress in between.",
    ),
    click.option(
        "--hang-timeout",
        type=click.FloatRange(0, min_open=True),
        default=60.0,
        show_default=True,
        help="Seconds without progress after which a worker is killed, from the first "
        "step on.",
    ),
    click.option(
        "--start-timeout",
        type=click.FloatRange(0, min_open=True),
        default=1800.0,
        show_default=True,
        help="Seconds allowed for each part of the start: loading the data, building "
        "the model, compiling it.",
    ),
    click.option(
        "--checkpoint-seconds",
        type=click.FloatRange(0),
        default=30.0,
        show_default=True,
        help="Seconds between checkpoints on disk; each epoch also ends with one.",
    ),
    click.option(
        "--keep-checkpoints",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Checkpoints to keep besides the newest and the best, after evenly spaced "
        "steps, for `samestep audit`.",
    ),
    click.option(
        "--checkpoint-steps",
        type=click.IntRange(1),
        help="Optimizer steps between further checkpoints on disk.",
    ),
    click.option(
        "--snapshot-seconds",
        type=click.FloatRange(0),
        default=0.5,
        show_default=True,
        help="Seconds between snapshots in memory; 0: no snapshots, and a checkpoint "
        "only at the end.",
    ),
    click.option(
        "--prefetch",
        type=click.Choice(["auto", "off"]),
        default="auto",
        help="Draw samples in the background if that takes more than 10% of a step.",
    ),
    click.option(
        "--probe/--no-probe",
        default=True,
        help="With your own code: compute one micro-batch of each epoch again in "
        "another process, and compare (default).",
    ),
    click.option(
        "--verify",
        type=click.FloatRange(0, 1),
        default=0.0,
        metavar="SHARE",
        help="Compute this share of the steps with a second worker each, compare, and "
        "repeat a step without the worker that was wrong.",
    ),
    click.option(
        "--ledger",
        type=click.Choice(["steps", "micro-batches"]),
        default="steps",
        show_default=True,
        help="Hashes to record: of each optimizer step, or also of each micro-batch, "
        "so that an audit can name it and the worker that computed it.",
    ),
    click.option(
        "--profile",
        type=click.IntRange(0, 1000),
        default=0,
        metavar="N",
        help="Write trace.json: N steps of all workers, for Perfetto.",
    ),
)

train_options = _group(
    _placement_options,
    recipe_options,
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Run directory; default: runs/<recipe>-<UTC time>.",
    ),
    set_option,
    training_code_options,
    _follow_options,
)

resume_options = _group(
    _placement_options,
    click.option("--epochs", type=int, help="Total number of epochs to train for."),
    click.option(
        "--allow-different-numerics",
        is_flag=True,
        help="Resume even if recipe, code, torch, instruction set or device have "
        "changed.",
    ),
    training_code_options,
    _follow_options,
)

nodes_options = _group(
    click.option(
        "--nodes",
        type=_nodes,
        metavar="N|MIN:MAX",
        help="Train on this many machines with torchrun; run this command on each. "
        "MIN:MAX: continue while at least MIN are there. `--workers` are per machine.",
    ),
    click.option(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="With --nodes: one of the machines, and a free port, where all meet; with "
        "`--rdzv-backend etcd-v2` a member of an etcd cluster.",
    ),
    click.option(
        "--rdzv-backend",
        type=click.Choice(("samestep", "etcd-v2")),
        default="samestep",
        help="With --nodes: whether they meet on the machine of the endpoint, which "
        "must stay up, or in etcd: then any machine may be lost; default: samestep.",
    ),
    click.option(
        "--rdzv-id",
        metavar="NAME",
        help="With --nodes: the job's name, the same on all machines, if several jobs "
        "share an endpoint; default: samestep.",
    ),
    interface_option,
)


def wants_several_machines(options: dict[str, Any]) -> bool:
    """Return whether the options ask for several machines, and remove those that do.

    Raises UsageError if only some of them are given.
    """
    rdzv_id, backend = options.pop("rdzv_id"), options.pop("rdzv_backend")
    names = ("nodes", "rdzv_endpoint", "interface")
    missing = [
        f"--{name.replace('_', '-')}" for name in names if options.pop(name) is None
    ]
    if 0 < len(missing) < len(names):
        raise UsageError(
            "Several machines need `--nodes`, `--rdzv-endpoint` and `--interface`; "
            f"missing: {', '.join(missing)}. For one machine, leave out all three."
        )
    if missing and rdzv_id is not None:
        raise UsageError(
            f"`--rdzv-id` is for several machines; received `{rdzv_id}` without "
            "`--nodes`. Leave it out, or add `--nodes`, `--rdzv-endpoint` and "
            "`--interface`."
        )
    if not missing and backend != "samestep" and rdzv_id is None:
        raise UsageError(
            "An etcd cluster keeps what earlier jobs left: give this one a name of its "
            "own, the same on all machines, with `--rdzv-id`."
        )
    return not missing
