"""A run's model for the tasks of lm-evaluation-harness (`pip install 'dtrain[tasks]'`).

Whatever kind of model and tokenizer the run has: only logits are asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from dtrain.trainer.compute import autocast
from dtrain.trainer.errors import RunError, UsageError
from dtrain.trainer.sampling import write
from dtrain.trainer.text import one_line
from dtrain.trainer.tokenizer import Tokenizer

TOKENS_AT_ONCE = 4096
MAX_NEW_TOKENS = 256

Pair = tuple[object, list[int], list[int]]
"""(what the harness keeps it by, context, continuation)"""


def score(
    model: TemplateLM, tasks: Sequence[str], more: Path | None, limit: int
) -> dict[str, dict[str, Any]]:
    """By task, its metrics. `more` is a folder with tasks of one's own, `limit` the most questions of each, 0 = all.

    UsageError for a task that there is not; RunError if its data cannot be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if more is None else str(more))
    for task in tasks:
        if task not in manager.all_tasks:
            raise UsageError(f"there is no task {task!r}: `lm-eval ls tasks` lists them")
    try:
        found = simple_evaluate(model, tasks=list(tasks), limit=limit or None, task_manager=manager)
    except (OSError, ConnectionError, ValueError) as error:
        raise RunError(f"the data of {', '.join(tasks)} cannot be had: {one_line(error)}") from None
    results: dict[str, dict[str, Any]] = found["results"]
    return results


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval ships no types
    """What the harness asks of a language model."""

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, seq_len: int, vocab: int):
        """seq_len: longest context in tokens. vocab: outputs that stand for tokens; the model may have more."""
        super().__init__()
        self._model, self._tokens, self._seq_len, self._vocab = model, tokenizer, seq_len, vocab

    @property
    def eot_token_id(self) -> int:
        return self._tokens.end

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokens: list[int] = self._tokens.encode([string])[0].tolist()
        return tokens

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._seq_len, 1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in self._loglikelihood_tokens(pairs)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._continue(*request.args) for request in requests]

    def _continue(self, context: str, wanted: dict[str, Any]) -> str:
        until = wanted.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        stream = write(
            self._model,
            self.tok_encode(context) or [self.prefix_token_id],
            self._seq_len,
            int(wanted.get("max_gen_toks", MAX_NEW_TOKENS)),
            temperature=float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0,
            vocab=self._vocab,
        )
        written: list[int] = []
        for token in stream:
            text = self._tokens.decode(written)
            if token == self.eot_token_id or any(stop in text for stop in stops):
                break
            written.append(token)
        text = self._tokens.decode(written)
        return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """Of each continuation: its log-probability in nats, and whether it is what the model would write."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # A causal model does not see what stands behind a position: short ones may share a pass with longer ones.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]) + len(requests[i][2]))
        for batch in self._batches(requests, order):
            rows = [(requests[i][1] + requests[i][2])[-(self._seq_len + 1) :] for i in batch]
            longest = max(len(row) for row in rows)
            x = torch.tensor([row[:-1] + [0] * (longest - len(row)) for row in rows])
            logits = self._logits(x)
            for i, row, row_logits in zip(batch, rows, logits):
                kept = min(len(requests[i][2]), len(row) - 1)
                if kept:
                    targets = torch.tensor(row[-kept:])
                    ends = row_logits[len(row) - 1 - kept : len(row) - 1, : self._vocab].log_softmax(dim=1)
                    picked = ends.gather(1, targets[:, None])
                    answers[i] = float(picked.sum()), bool((ends.argmax(dim=1) == targets).all())
        return answers

    def _batches(self, requests: Sequence[Pair], order: Sequence[int]) -> Iterable[list[int]]:
        batch: list[int] = []
        for i in order:
            length = min(self._seq_len, len(requests[i][1]) + len(requests[i][2]))
            if batch and (len(batch) + 1) * length > TOKENS_AT_ONCE:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, outputs] of x [B, T], on the CPU."""
        device = next(self._model.parameters()).device
        with autocast(device):
            logits: torch.Tensor = self._model(x.to(device))
        return logits.float().cpu()
