"""Models with several inputs: dictionaries and tuples, one fingerprint as ever."""

import json

import pytest
import torch
from conftest import Own, Train, fault
from hypothesis import given
from hypothesis import strategies as st

import samestep
from samestep.data import pytree
from samestep.errors import SamestepError
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


MASKED = """
class Net(nn.Module):
    def __init__(self, outputs, width=8):
        super().__init__()
        self.tokens = nn.Embedding(6, width)
        self.types = nn.Embedding(2, width)
        self.last = nn.Linear(width, outputs)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        h = self.tokens(input_ids)
        if token_type_ids is not None:
            h = h + self.types(token_type_ids)
        mask = attention_mask.unsqueeze(-1)
        h = functional.dropout(h * mask, 0.1, self.training)
        return {"logits": self.last(h.sum(1) / mask.sum(1))}

def build(inputs, outputs):
    assert inputs == {name: (7,) for name in inputs}
    return Net(outputs)

def loss(outputs, targets):
    logits = outputs["logits"]
    right = (logits.argmax(1) == targets).sum()
    return functional.cross_entropy(logits, targets, reduction="sum"), {"right": right}

def sample(i, with_mask=True):
    g = torch.Generator().manual_seed(i)
    length = 2 + i % 6
    return {
        "input_ids": torch.randint(6, (7,), generator=g).tolist(),
        "attention_mask": [int(j < length or not with_mask) for j in range(7)],
        "token_type_ids": [j % 2 for j in range(7)],
        "labels": i % 3,
    }
"""
ROWS = (
    MASKED
    + """
def load(with_mask=True):
    return {"train": [sample(i, with_mask) for i in range(60)],
            "validation": [sample(i, with_mask) for i in range(60, 80)],
            "test": [sample(i, with_mask) for i in range(80, 100)]}
"""
)
IN_MEMORY = (
    MASKED
    + """
def load(with_mask=True):
    rows = [sample(i, with_mask) for i in range(100)]
    columns = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    labels = columns.pop("labels")
    return {name: ({k: v[a:b] for k, v in columns.items()}, labels[a:b])
            for name, a, b in (("train", 0, 60), ("validation", 60, 80),
                               ("test", 80, 100))}
"""
)
PAIRS = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(2, 4)
        self.last = nn.Linear(4, 3)
    def forward(self, x, more):
        assert more["kept"].dtype == torch.bool
        h = self.first(x) + self.second(more["z"]) * more["kept"]
        return self.last(torch.relu(h))

def build(inputs):
    assert inputs == ((5,), {"z": (2,), "kept": (1,)})
    return Net()

class Slow(Dataset):
    def __len__(self):
        return 90
    def __getitem__(self, i):
        import time
        time.sleep(0.001)
        x, y = some()
        noise = torch.rand(()) + np.random.rand()
        return (x[i] + noise, {"z": x[i, :2].numpy(), "kept": [i % 4 > 0]}), int(y[i])

def load():
    return Slow()
"""


@pytest.mark.parametrize("code", [ROWS, IN_MEMORY, PAIRS])
def test_several_inputs_have_one_fingerprint_at_any_placement(
    train: Train, own: Own, code: str
) -> None:
    recipe = own(code)
    alone = train(recipe, 1, prefetch="off")
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]


def test_rows_and_columns_give_the_same_weights(train: Train, own: Own) -> None:
    rows, columns = train(own(ROWS), 1), train(own(IN_MEMORY), 1)
    assert rows.weights_sha256 == columns.weights_sha256
    assert columns.export("onnx").is_file()


def test_every_column_of_a_sample_reaches_the_model(train: Train, own: Own) -> None:
    recipe = own(ROWS)
    with_, without = (
        train(recipe.changed({"data.arguments": {"with_mask": mask}}), 1)
        for mask in (True, False)
    )
    assert with_.weights_sha256 != without.weights_sha256


def test_several_inputs_survive_kills_resume_and_evaluation(
    train_under: Train, train: Train, own: Own, server: ForkServer
) -> None:
    recipe = own(PAIRS)
    kills = [fault("kill", "forward", 1, 0), fault("kill", "exchange", 2, 1, 2)]
    run = train_under(recipe, kills, 2)
    whole = train(recipe.changed({"epochs": 2}), 1)
    longer = samestep.resume(run, epochs=2, view=SilentView(), server=server)
    assert longer.weights_sha256 == whole.weights_sha256
    assert run.result["restarts"] == 2
    found = samestep.evaluate(run, workers=2, server=server)
    assert found.loss == longer.result["test_loss"]
    assert run.result["data"]["inputs"] == [[5], {"z": [2], "kept": [1]}]
    run.load_model()
    for form in ("safetensors", "onnx"):
        assert run.export(form).is_file()


def test_a_collate_fn_pads_samples_of_different_lengths(train: Train, own: Own) -> None:
    ragged = ROWS.replace("[sample(i, with_mask) for i in range(60)]", "Ragged()")
    code = (
        ragged
        + """
class Ragged(Dataset):
    def __len__(self):
        return 60
    def __getitem__(self, i):
        row = sample(i)
        return {k: v if k == "labels" else v[: 2 + i % 6] for k, v in row.items()}
    def collate_fn(self, rows):
        most = max(len(row["input_ids"]) for row in rows)
        pad = lambda v: v if isinstance(v, int) else v + [0] * (most - len(v))
        return {k: torch.tensor([pad(row[k]) for row in rows]) for k in rows[0]}
"""
    ).replace("== {name: (7,) for name in inputs}", "")
    recipe = own(code)
    assert train(recipe, 2).weights_sha256 == train(recipe, 1).weights_sha256


WRONG = {
    "ragged": (
        "def load(): return [{'x': [0] * (2 + i), 'z': [1], 'y': i % 2}"
        " for i in range(20)]",
        r'the input of `mine_.* has \["x"\] \[\d+\].* in sample \d+, \["x"\] '
        r"\[\d+\].* in sample \d+. Pad .*`collate_fn`",
    ),
    "other-keys": (
        "def load(): return [{'x': [0], 'z' if i else 'w': [1], 'y': i % 2}"
        " for i in range(20)]",
        r'\["[zw]"\] \[1\].* in sample \d+, .*\["[zw]"\] \[1\].* in sample \d+',
    ),
    "unknown-argument": (
        "def load(): return [{'x': [0.], 'z': [1], 'y': i % 2} for i in range(20)]\n"
        "class Net(nn.Linear):\n def forward(self, x): return super().forward(x)\n"
        "def build(): return Net(1, 2)",
        r'\["x"\] \[2, 1\].*unexpected keyword argument.*gives the model keyword',
    ),
    "built-in": (
        "def load(): return [{'x': [0.], 'z': [1], 'y': i % 2} for i in range(20)]",
        "family takes one input; a sample of these data has several",
    ),
    "text": (
        "def load(): return [{'x': [0.], 'z': 'Hello', 'y': i % 2} for i in range(20)]",
        "`z` of the input of `mine_.* has 'Hello'. Encode it, or leave it out",
    ),
    "complex": (
        "def load(): return torch.ones(9, 2, dtype=torch.complex64), torch.ones(9)",
        "the inputs of `mine_.* has torch.complex64.*view_as_real",
    ),
    "several-targets": (
        "def load(): return [([0.], {'a': [1], 'b': [2]}) for i in range(20)]",
        "The target of a sample is one tensor",
    ),
    "raises": (
        "class Bad(Dataset):\n"
        " def __len__(self): return 20\n"
        " def __getitem__(self, i):\n"
        "  return ([[1.0]][i], i % 2)\n"
        "def load(): return {'train': Bad()}",
        r"Sample 1 of `mine_.*:load`, split `train` failed: IndexError",
    ),
    "raises-later": (
        "class Bad(Dataset):\n"
        " classes = 'ab'\n"
        " def __len__(self): return 24\n"
        " def __getitem__(self, i):\n"
        "  return [[[1.0]][i == 7], i % 2]\n"
        "def load(): return {'train': Bad()}",
        r"Sample 7 of `mine_.*:load`, split `train` failed: IndexError",
    ),
}


LATER = ("raises-later",)
"""What is met when the training has begun: exit code 1, and not 2."""


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_an_input_is_said_with_its_key_and_index(
    train: Train, own: Own, kind: str
) -> None:
    code, message = WRONG[kind]
    fields = {"model": {"family": "mlp", "hidden": [4]}} if kind == "built-in" else {}
    with pytest.raises(SamestepError, match=f"(?s){message}") as caught:
        train(own(code, **fields))
    assert caught.value.exit_code == (1 if kind in LATER else 2)


def test_bool_inputs_stay_bool(train: Train, own: Own) -> None:
    code = """
class Net(nn.Linear):
    def forward(self, kept):
        assert kept.dtype == torch.bool
        return super().forward((~kept).float())

def load():
    x, y = some()
    return x > 0, y

def build(inputs, outputs):
    return Net(*inputs, outputs)
"""
    recipe = own(code)
    assert train(recipe, 2).weights_sha256 == train(recipe, 1).weights_sha256


@given(st.data())
def test_a_nested_structure_comes_back_from_its_tensors_and_json(
    data: st.DataObject,
) -> None:
    tensors = st.lists(st.integers(0, 3), max_size=3).map(torch.zeros)
    value = data.draw(
        st.recursive(
            tensors,
            lambda inner: (
                st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=3)
                | st.lists(inner, min_size=1, max_size=3).map(tuple)
            ),
            max_leaves=6,
        )
    )
    structure = json.loads(json.dumps(pytree.apply(lambda _: None, value)))
    leaves = [tensor for _, tensor in pytree.leaves(value)]
    found = pytree.restore(structure, iter(leaves))
    assert pytree.apply(id, found) == pytree.apply(id, value)
    names = [name for name, _ in pytree.leaves(value)]
    assert len(names) == len(set(names)) == len(leaves)
