"""Scripts of other projects' documentation, and the lines that make them exact."""

import difflib
import re
from dataclasses import dataclass, field


IMPORT = "from accelerate import Accelerator"
OWN = "from samestep.accelerate import Accelerator"
MADE = "accelerator = Accelerator("
STRATEGY = "from samestep.lightning import SamestepStrategy\n"
TRAINER = "from samestep.transformers import SamestepTrainer\n"


@dataclass(frozen=True)
class Script:
    """One script: where it is, and what a user changes in it."""

    library: str
    path: str
    micro_batches: int = 8
    arguments: tuple[str, ...] = ()
    """`{processes}` is their number."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Texts of lines that are changed, and what they become."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    def changed(self, text: str, processes: int) -> tuple[str, int]:
        """Return the script as changed, and how many lines are new.

        Raises ValueError if it is not the script that is known here.
        """
        replaced = self.replaced
        if self.library == "accelerate":
            (imported,) = re.findall(f"^{IMPORT}.*$", text, re.MULTILINE)
            replaced = {
                imported: f"{imported}\n{OWN}",
                MADE: f"{MADE}micro_batches={self.micro_batches}, ",
            }
        new = text
        for old, made in replaced.items():
            new = new.replace(old, made.replace("{processes}", str(processes)))
        lines = text.splitlines(), new.splitlines()
        changed = [line for line in difflib.ndiff(*lines) if line.startswith("+ ")]
        if replaced and not changed:
            raise ValueError(f"{self.name}: nothing to change was found.")
        return new, len(changed)


def accelerate(path: str, *arguments: str) -> Script:
    return Script("accelerate", path, arguments=arguments)


def transformers(
    path: str, model: str, data: str, *arguments: str, of: str = ""
) -> Script:
    """Return a script of Transformers, whose trainer is a Trainer or `of` a subclass.

    `data` names a part of the data by `{}`.
    """
    kind = "dir" if "images" in data else "file"
    files = f"--train_{kind}", data.format("train")
    files += f"--validation_{kind}", data.format("valid")
    made, class_line = "SamestepTrainer", ""
    if of:
        made, class_line = "Exact", f"    class Exact(SamestepTrainer, {of}): pass\n"
    return Script(
        "transformers",
        path,
        arguments=("--model_name_or_path", model, *files, *arguments, *TRAINED),
        replaced={
            "import transformers\nfrom": f"{TRAINER}import transformers\nfrom",
            f"    trainer = {of or 'Trainer'}(": (
                f"{class_line}    trainer = {made}(micro_batches=8, "
            ),
        },
    )


TRAINED = (
    *("--do_train", "--do_eval", "--use_cpu", "--output_dir", "trained"),
    *("--per_device_train_batch_size", "16", "--num_train_epochs", "2"),
    *("--logging_steps", "3", "--save_steps", "5", "--eval_strategy", "epoch"),
    *("--learning_rate", "0.003", "--report_to", "none"),
)
CLI = (
    "--trainer.strategy=samestep.lightning.SamestepStrategy",
    "--trainer.strategy.micro_batches=8",
    "--trainer.accelerator=cpu",
    "--trainer.devices={processes}",
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=20",
    "--trainer.limit_val_batches=5",
    "--trainer.limit_test_batches=5",
    "--trainer.limit_predict_batches=2",
)
PLACE = 'accelerator="cpu", devices={processes}, strategy=SamestepStrategy(4)'
SCRIPTS = [
    accelerate("nlp_example.py"),
    accelerate("cv_example.py", "--data_dir", "pets"),
    accelerate("complete_nlp_example.py", "--checkpointing_steps", "epoch"),
    accelerate(
        "by_feature/gradient_accumulation.py", "--gradient_accumulation_steps", "2"
    ),
    accelerate("by_feature/multi_process_metrics.py"),
    accelerate("by_feature/early_stopping.py"),
    accelerate("by_feature/checkpointing.py", "--checkpointing_steps", "epoch"),
    accelerate("by_feature/gradient_accumulation_for_autoregressive_models.py"),
    Script("lightning", "basics/autoencoder.py", arguments=CLI),
    Script("lightning", "basics/backbone_image_classifier.py", arguments=CLI),
    Script(
        "lightning",
        "basics/transformer.py",
        replaced={
            "import lightning as L": f"{STRATEGY}import lightning as L",
            "max_epochs=20": f"max_epochs=1, limit_val_batches=5, {PLACE}",
        },
    ),
    Script(
        "lightning",
        "domain_templates/generative_adversarial_net.py",
        replaced={
            "import math": f"{STRATEGY}import math",
            "    model = GAN(": "    torch.manual_seed(0)\n    model = GAN(",
            'accelerator="gpu", devices=1': (
                f"{PLACE}, max_epochs=1, limit_train_batches=10"
            ),
        },
    ),
    transformers(
        "text-classification/run_classification.py",
        "bert",
        "sentences-{}.csv",
        *("--text_column_names", "sentence", "--shuffle_train_dataset"),
        *("--do_predict", "--test_file", "sentences-test.csv"),
    ),
    transformers("text-classification/run_glue.py", "bert", "pairs-{}.csv"),
    transformers(
        "language-modeling/run_clm.py",
        "llama",
        "{}.txt",
        *("--block_size", "16", "--gradient_accumulation_steps", "2"),
    ),
    transformers("language-modeling/run_mlm.py", "bert", "{}.txt", "--line_by_line"),
    transformers("token-classification/run_ner.py", "bert", "tags-{}.json"),
    transformers("multiple-choice/run_swag.py", "bert", "endings-{}.csv"),
    transformers(
        "question-answering/run_qa.py",
        "bert",
        "questions-{}.json",
        *("--max_seq_length", "64", "--doc_stride", "16"),
        of="QuestionAnsweringTrainer",
    ),
    transformers(
        "translation/run_translation.py",
        "t5",
        "translated-{}.json",
        *("--source_lang", "en", "--target_lang", "de"),
        *("--predict_with_generate", "--generation_max_length", "8"),
        of="Seq2SeqTrainer",
    ),
    transformers(
        "image-classification/run_image_classification.py",
        "vit",
        "images/{}",
        *("--remove_unused_columns", "False", "--ignore_mismatched_sizes"),
    ),
]
