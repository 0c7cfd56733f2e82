"""Tasks of lm-evaluation-harness against what the model says by itself. `make hf-test` installs the harness."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from swarm_tools import swarm
from torch import Tensor, nn

from dtrain.trainer.cli import main
from dtrain.trainer.tokenizer import ByteTokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

SEQ_LEN = 16
CHOICES = ("tok tok", "quiz", "a much longer answer than the context holds")
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


class Bigram(nn.Module):
    """The next byte depends on the last one only; has more outputs than there are bytes."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(256, 300, generator=torch.Generator().manual_seed(1))
        table[:, 256:] += 100.0  # tokens that do not exist
        self.table = nn.Parameter(table)
        self.longest = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        return self.table[tokens]

    def nats(self, before: int, text: str, kept: int) -> float:
        """Log-probability of the last `kept` bytes of the text that follows a byte."""
        chain = [before, *text.encode()][-kept - 1 :]
        steps = self.table[:, :256].log_softmax(dim=1)
        return float(sum(steps[a, b] for a, b in itertools.pairwise(chain)))


@pytest.fixture
def bigram() -> Bigram:
    return Bigram().eval()


def harness(model: nn.Module):  # type: ignore[no-untyped-def]
    from dtrain.trainer.harness import HarnessModel

    return HarnessModel(model, ByteTokenizer(), SEQ_LEN, 256)


def task_folder(folder: Path, rows: int = 3) -> Path:
    """A folder with the task "tiny", in which another choice is right in every row."""
    data = folder / "rows.jsonl"
    lines = ({"question": f"q{i}:", "choices": CHOICES, "label": i % 3} for i in range(rows))
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tiny.yaml").write_text(TASK.format(file=data))
    return folder


def test_log_probabilities_are_the_models_own(bigram: Bigram) -> None:
    """Whatever shares a batch, and whatever is too long for the context."""
    requests = [SimpleNamespace(args=("q1:", choice)) for choice in CHOICES]
    answers = harness(bigram).loglikelihood(requests, disable_tqdm=True)
    for (nats, greedy), choice in zip(answers, CHOICES, strict=True):
        assert nats == pytest.approx(bigram.nats(ord(":"), choice, min(len(choice), SEQ_LEN)), abs=1e-3)
        assert not greedy
    assert bigram.longest == SEQ_LEN


def test_a_text_is_scored_whole_in_windows(bigram: Bigram) -> None:
    text = "a text that takes several windows of the context to read"
    (nats,) = harness(bigram).loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    assert nats == pytest.approx(bigram.nats(ByteTokenizer.end, text, len(text)), abs=1e-3)


def test_text_is_written_up_to_a_stop(bigram: Bigram) -> None:
    with torch.no_grad():
        for a, b in ("ab", "bc", "cd", "de"):
            bigram.table[ord(a), ord(b)] = 50.0
    model, request = harness(bigram), ("xa", {"until": ["d"], "max_gen_toks": 9})
    assert model.generate_until([SimpleNamespace(args=request)]) == ["bc"]
    assert model.generate_until([SimpleNamespace(args=("a", {"until": [], "max_gen_toks": 3}))]) == ["bcd"]
    (found,) = model.loglikelihood([SimpleNamespace(args=("a", "bcd"))], disable_tqdm=True)
    assert found[1]  # what it would write


def test_a_task_of_ones_own_is_scored(bigram: Bigram, tmp_path: Path) -> None:
    from dtrain.trainer.harness import score

    results = score(harness(bigram), ["tiny"], task_folder(tmp_path), limit=0)
    assert results["tiny"]["acc,none"] == pytest.approx(
        1 / 3
    )  # it knows the last byte only: one answer for all


@pytest.mark.xdist_group("processes")
def test_the_command_scores_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what a worker has left, also when the task is not there or its data is gone."""
    with swarm("tasks", tmp_path) as workers:
        workers.start("a", "--inner-steps", "1", "--batch-size", "2", "--rounds", "1", "--eval-every", "0")
        assert workers.workers[0].wait() == 0
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task_folder(tasks)
    command = ["eval", "--folder", str(tmp_path / "a"), "--tasks", "tiny", "--tasks-from", str(tasks)]
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["round"] == 1 and 0 <= found["tasks"]["tiny"]["acc"] <= 1
    assert main([*command, "--limit", "1"]) == 0
    assert "tiny: acc " in capsys.readouterr().out
    assert main([*command[:-3], "no-such-task"]) == 2
    assert "there is no task 'no-such-task'" in capsys.readouterr().err
    (tasks / "rows.jsonl").unlink()
    assert main(command) == 1
    assert "cannot be had" in capsys.readouterr().err
