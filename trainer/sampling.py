"""Text written by the model as it stands, for those who watch the run."""

from __future__ import annotations

import math
import time

import torch

from dtrain.trainer.data import Corpus
from dtrain.trainer.exchange import ABSENT, Exchange
from dtrain.trainer.inner import autocast
from dtrain.trainer.model import GPT

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
def write_sample(model: GPT, corpus: Corpus, round: int) -> tuple[str, str]:
    """(prompt, continuation): the prompt is evaluation text, another piece for every round.

    The continuation is as long as `MAX_TOKENS` and `MAX_SECONDS` allow.
    """
    device = next(model.parameters()).device
    context = model.config.seq_len
    prompt_tokens = min(PROMPT_TOKENS, context // 2, len(corpus.eval))
    start = round * 7919 % max(1, len(corpus.eval) - prompt_tokens)
    prompt = torch.from_numpy(corpus.eval[start : start + prompt_tokens].astype("int64"))
    generator = torch.Generator().manual_seed(round)  # the training's own random numbers stay as they are
    tokens, until = prompt.clone(), time.monotonic() + MAX_SECONDS
    while len(tokens) < prompt_tokens + MAX_TOKENS and time.monotonic() < until:
        with autocast(device):
            logits = model(tokens[-context:].to(device)[None])[0, -1].float().cpu()
        chosen = torch.multinomial(torch.softmax(logits / TEMPERATURE, 0), 1, generator=generator)
        tokens = torch.cat((tokens, chosen))
    return _text(prompt), _text(tokens[prompt_tokens:])


def _text(tokens: torch.Tensor) -> str:
    """Byte tokens as text; bytes that are no UTF-8 become U+FFFD."""
    return bytes(tokens.clamp(max=255).tolist()).decode("utf-8", "replace")
