"""Operations of own losses beside NumPy, bit for bit, on every instruction set."""

import numpy as np
import pytest
import torch
from loss_styles import STYLES, random_targets
from numpy.typing import NDArray
from torch import Tensor, nn

from samestep.config.model import CustomLoss
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind, Unary
from samestep.kernels.library import load_kernels, supported_isas
from samestep.kernels.lower import lower
from samestep.kernels.program import NONE, Buffer, Op, Program
from samestep.kernels.trace import Kind, OwnLoss
from samestep.models.objective import Objective
from samestep.portable import functions
from samestep.portable.passes import places_of
from samestep.state.flat import Flat
from samestep.verification.beside_torch import BesideTorch


Floats = NDArray[np.float32]
SAMPLES, POSITIONS, CLASSES = 45, 3, 300
WHOLE = [1] * 5


def run(ops: list[Op], rows: int, isa: str, x: Tensor, labels: Tensor) -> Floats:
    """Run operations; buffer 0 has x, buffer 1 the labels, buffer 2 what they make."""
    features = [POSITIONS * CLASSES, POSITIONS, rows]
    loads = [
        Op(OpKind.LOAD, [0, NONE, features[0]]),
        Op(OpKind.LOAD_TOKENS, [1, NONE, POSITIONS, 0, 0, 1]),
    ]
    end = Op(OpKind.STORE, [2, rows])
    program = Program(
        (*loads, *ops, end), tuple(map(Buffer, features)), 2, positions=POSITIONS
    )
    execution = Execution(program, load_kernels(isa), SAMPLES, 1)
    outputs = torch.zeros(SAMPLES, rows)
    execution.bind(inputs=x.flatten(1).contiguous(), outputs=outputs)
    execution.labels[: labels.numel()] = labels.flatten().numpy()
    execution.bind_micro_batches(torch.tensor([0, SAMPLES]), torch.tensor([0]))
    execution.run()
    return outputs.numpy()


def table(function: Unary, source: int, rows: int) -> Op:
    """Return a function of whole rows, into buffer 2."""
    strides = [0] * 5 + [1]
    i = [source, 2, function, rows, 0, rows, 0, *WHOLE, rows, *strides, *strides]
    return Op(OpKind.UNARY, i)


@pytest.fixture
def x() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, POSITIONS, CLASSES, generator=draw)


@pytest.fixture
def labels() -> Tensor:
    """Return classes, some of which are none."""
    draw = torch.Generator().manual_seed(2)
    drawn = torch.randint(CLASSES, (SAMPLES, POSITIONS), generator=draw)
    drawn[::7, 1] = -100
    drawn[3] = CLASSES
    drawn[4, 0] = 2**40
    return drawn


@pytest.mark.parametrize("isa", supported_isas())
def test_labels_pick_numbers_and_give_gradients_back(
    isa: str, x: Tensor, labels: Tensor
) -> None:
    is_class = (labels >= 0) & (labels < CLASSES)
    places = labels.where(is_class, 0)[..., None]
    picked = x.gather(2, places)[..., 0].masked_fill(~is_class, torch.nan)
    op = Op(OpKind.PICK, [0, 2, 1, POSITIONS, CLASSES])
    assert np.array_equal(
        run([op], POSITIONS, isa, x, labels), picked.numpy(), equal_nan=True
    )
    # The first rows of x are the gradients.
    dy = x.flatten(1)[:, :POSITIONS]
    back = torch.zeros_like(x).scatter(2, places, (dy * is_class)[..., None])
    op = Op(OpKind.PICK_GRAD, [0, 2, 1, POSITIONS, CLASSES])
    rows = POSITIONS * CLASSES
    buffer = Op(OpKind.LOAD, [0, NONE, POSITIONS, 0, rows])
    found = run([buffer, op], rows, isa, x, labels)
    assert np.array_equal(found, back.flatten(1).numpy())


@pytest.mark.parametrize("isa", supported_isas())
def test_logarithms_of_shares_are_those_of_the_specification(
    isa: str, x: Tensor, labels: Tensor
) -> None:
    rows = POSITIONS * CLASSES
    op = Op(OpKind.SOFTMAX, [0, 2, rows, CLASSES, 0, 1])
    away = x - x.amax(2, keepdim=True)
    powers = functions.compute("exp", away).numpy()
    total = np.zeros((SAMPLES, POSITIONS), np.float32)
    for start in range(0, CLASSES, 256):
        block = np.zeros_like(total)
        for c in range(start, min(start + 256, CLASSES)):
            block = block + powers[..., c]
        total = total + block
    logs = functions.compute("log", torch.from_numpy(total)).numpy()
    expected = (away.numpy() - logs[..., None]).reshape(SAMPLES, rows)
    assert np.array_equal(run([op], rows, isa, x, labels), expected)


@pytest.mark.parametrize("isa", supported_isas())
def test_integers_become_floats_and_floats_are_cut_off(
    isa: str, x: Tensor, labels: Tensor
) -> None:
    op = table(Unary.FROM_INT, 1, POSITIONS)
    expected = labels.where(labels < 2**31, -1).float().numpy()
    assert np.array_equal(run([op], POSITIONS, isa, x, labels), expected)
    numbers = x.flatten(1)[:, :POSITIONS] * 1000
    numbers[0, 0], numbers[1, 1], numbers[2, 2] = torch.nan, 3e9, torch.inf
    x = torch.cat([numbers, x.flatten(1)[:, POSITIONS:]], 1).view(x.shape)
    cut = numbers.nan_to_num(-1.0, posinf=-1.0).where(numbers != 3e9, -1.0).trunc()
    rows = Op(OpKind.LOAD, [2, NONE, POSITIONS, 0, POSITIONS * CLASSES])
    ops = [rows, table(Unary.TO_INT, 2, POSITIONS), table(Unary.FROM_INT, 2, POSITIONS)]
    assert np.array_equal(run(ops, POSITIONS, isa, x, labels), cut.numpy())


def prepared(style: str) -> tuple[BesideTorch, Flat, Tensor]:
    """Return what compares a small model with this loss beside torch."""
    function, shape, _ = STYLES[style]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, int(np.prod(shape))), nn.Unflatten(1, shape))
    flat, targets = Flat(model, constant=set()), random_targets(style, 21)
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    loss = CustomLoss(function="mine:loss")

    def own(outputs: Tensor, targets: Tensor) -> object:
        returned = function(outputs, targets)
        plain = isinstance(returned, Tensor)
        return (returned, {"sum": outputs.sum()}) if plain else returned

    objective = Objective(model, loss, own)
    kind = Kind(tuple(targets.shape[1:]), targets.dtype)
    own_loss = OwnLoss(objective.summands, kind)
    program = lower(model, (6,), places_of(flat), own_loss)
    beside = BesideTorch(program, objective, flat, vector, load_kernels(), 7)
    return beside, flat, targets


@pytest.mark.parametrize("style", STYLES)
def test_losses_of_many_styles_have_the_gradients_of_torch(style: str) -> None:
    beside, _, targets = prepared(style)
    beside.check(torch.randn(21, 6), targets)


def test_every_instruction_set_measures_the_same() -> None:
    beside, flat, targets = prepared("padded")
    x = torch.randn(21, 6)
    found = []
    for isa in supported_isas():
        execution = Execution(beside.program, load_kernels(isa), 21, 2)
        slot = torch.zeros(flat.size)
        execution.bind(parameters=beside.parameters, inputs=x)
        execution.bind_micro_batches(torch.tensor([0, 8, 21]), torch.tensor([0, 1]))
        execution.bind_slots([slot], flat.size)
        execution.call.weight = 1.0
        execution.labels[: targets.numel()] = targets.flatten().numpy()
        execution.run()
        found.append((slot.numpy().tobytes(), execution.cell_sums.tobytes()))
        by_sample = execution.losses[: 21 * 5].reshape(21, 5).astype(float)
        sums = [np.add.accumulate(part)[-1] for part in (by_sample[:8], by_sample[8:])]
        assert np.array_equal(execution.cell_sums, sums)
    assert len(set(found)) == 1
