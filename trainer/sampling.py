"""Text written by the model as it stands, for those who watch the run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dtrain.trainer.compute import autocast
from dtrain.trainer.data import Data
from dtrain.trainer.exchange import ABSENT, Exchange
from dtrain.trainer.inner import evaluating

PROMPT_TOKENS = 48
MAX_TOKENS = 160
PERIOD_S = 10.0  # at most one sample per this time
MAX_SECONDS = 1.0  # the others of the round wait meanwhile
TEMPERATURE = 0.8


class Sampler:
    """Decides who writes: one worker is enough, and every observer reads what it wrote."""

    def __init__(self) -> None:
        self._last_s = -math.inf

    def is_due(self, exchange: Exchange, now_s: float) -> bool:
        """Whether it is on us: of those that take part, the worker with the smallest id writes."""
        active = [view.peer_id for view in exchange.swarm() if view.status["state"] not in ABSENT]
        if now_s - self._last_s < PERIOD_S or any(peer < exchange.peer_id for peer in active):
            return False
        self._last_s = now_s
        return True


@torch.no_grad()
def write_sample(model: nn.Module, data: Data, round: int, context: int) -> tuple[str, str]:
    """(prompt, continuation): the prompt is evaluation text, another piece for every round.

    The continuation is as long as `MAX_TOKENS`, `MAX_SECONDS` and the model's `context` (in tokens) allow.
    """
    prompt = data.prompt(round, min(PROMPT_TOKENS, context // 2))
    seconds = MAX_SECONDS
    with evaluating(model):
        written = list(
            write(model, prompt, context, MAX_TOKENS, seconds, seed=round, vocab=data.tokenizer.size)
        )
    return data.tokenizer.decode(prompt), data.tokenizer.decode(written)


@torch.no_grad()
def write(
    model: nn.Module,
    prompt: Sequence[int],
    context: int,
    num_tokens: int,
    seconds: float = math.inf,
    *,
    temperature: float = TEMPERATURE,
    seed: int = 0,
    vocab: int = 0,
) -> Iterator[int]:
    """Tokens that follow the prompt, one by one; the likeliest ones at temperature 0.

    `vocab` bounds what is chosen, for a model that has more outputs than the tokenizer has tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # the training's own random numbers stay as they are
    tokens, until = torch.tensor(list(prompt)), time.monotonic() + seconds
    for _ in range(num_tokens):
        if time.monotonic() >= until:
            return
        with autocast(device):
            logits = model(tokens[-context:].to(device)[None])[0, -1].float().cpu()
        logits = logits[:vocab] if vocab else logits
        if temperature:
            chosen = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
        else:
            chosen = logits.argmax(0, keepdim=True)
        tokens = torch.cat((tokens, chosen))
        yield int(chosen)
