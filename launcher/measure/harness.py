"""lm-evaluation-harness on a member of a run as it is inside Motet, without an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from motet.core.errors import UserError
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.models.decoder import Decoder
from motet.models.member import Member


def evaluate_inside(
    decoder: Decoder,
    member: Member | None,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    length: int,
    limit: int | None = None,
    include: Path | None = None,
) -> dict[str, Any]:
    """Return what lm-evaluation-harness finds: `results` by task, and `samples` with the
    log-likelihood of every answer. lm_eval must be installed.

    Args:
        length: tokens of context at most.
        limit: documents per task.
        include: folder with tasks of one's own.

    Raises:
        UserError: a task lets the model write; Motet's decoder scores only.
    """
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    class MemberLM(TemplateLM):  # type: ignore[misc]
        """Scores text as `HFLM` does: no special tokens, an end of document where nothing stands
        before."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eod

        def tok_encode(self, string: str, **_: Any) -> list[int]:
            return tokenizer.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [score(context, more) for _, context, more in requests]

        def loglikelihood_rolling(self, requests: Any, **_: Any) -> list[float]:
            return [rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: Any, **_: Any) -> list[str]:
            raise UserError("--inside: a task lets the model write; leave --inside out for it")

    def score(context: Sequence[int], more: Sequence[int]) -> tuple[float, bool]:
        """Return the log-likelihood of tokens after a context, and whether each is likeliest."""
        row = torch.tensor([*context, *more][-(length + 1) :])
        with torch.no_grad():
            logits_TV = decoder(row[None, :-1], member=member)[0, -len(more) :].log_softmax(-1)
        wanted = row[-len(more) :]
        found = logits_TV.gather(1, wanted[:, None]).sum().item()
        return found, bool((logits_TV.argmax(-1) == wanted).all())

    def rolling(text: str) -> float:
        tokens = [tokenizer.eod, *tokenizer.encode(text)]
        starts = range(1, len(tokens), length)
        return sum(score(tokens[max(0, at - 1) : at], tokens[at : at + length])[0] for at in starts)

    manager = TaskManager(include_path=None if include is None else str(include))
    found = simple_evaluate(
        model=MemberLM(), tasks=list(tasks), limit=limit, task_manager=manager, bootstrap_iters=0
    )
    return dict(found)
