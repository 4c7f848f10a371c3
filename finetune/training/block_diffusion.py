"""The masked objective of a model that writes block by block: each block noised, beside the clean ones before it.

One run prices all blocks: the noised sequence stands before the clean one, both at positions 0 to n - 1, and
`training_mask` lets a noised token see its own noised block and the clean blocks before. That is what each block would
be given alone, behind its clean prefix.

Each block of a row has a rate t of its own, as BD3-LM draws them. Recipes that draw one for the whole row (A2D's) price
the same: no noised block sees another, so the blocks' losses add up, and their expectation is that of each alone.

With shift 1 (Fast-dLLM v2) token i is priced at row i - 1 of the noised half, a block's first token at the last row of
the noised block before. When it is asked, that row comes from the finished block: training is noisier there.

Shapes below: batch, seq, blocks, vocab.
Source: Arriola et al. 2025 (arXiv 2503.09573), Sec. 3 and App. B.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ...errors import RevprobeError
from ...models.contract import introspect
from ...models.contract.block_masks import added_to_scores, training_mask
from ...models.peft_adapters import without_wrapper
from ...models.probed import ProbedModel


def draw_block_masks(
    shape: tuple[int, int],
    block_size: int,
    *,
    generator: torch.Generator,
    eps: float,
    highest: float = 1.0,
    antithetic: bool = False,
    leader: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw which tokens are masked, each block of each row at its own rate, and what each token's loss is divided by.

    Shapes: `-> batch seq, batch seq (bool)`, on the CPU.
    Args:
        eps, highest, leader, antithetic: as in `draw_masks`; tokens of one leader share its block's rate too, and rates
            are spread evenly over all blocks of the batch, so that each row has low and high ones.
    """
    batch, seq = shape
    blocks = -(-seq // block_size)
    if antithetic:
        spread = torch.arange(batch * blocks).view(blocks, batch).T / (batch * blocks)
        uniform = (torch.rand(1, generator=generator) + spread) % 1
    else:
        uniform = torch.rand(batch, blocks, generator=generator)
    rate = (eps + (highest - eps) * uniform).repeat_interleave(block_size, dim=1)[:, :seq]
    drawn = torch.rand(batch, seq, generator=generator)
    if leader is not None:
        rate, drawn = (table.gather(1, leader.cpu()) for table in (rate, drawn))
    return rate, drawn < rate


def block_logits(
    model: nn.Module, noised: Tensor, clean: Tensor, block_size: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Logits of the noised tokens, each block beside the clean blocks before it; padding is seen by none.

    Shapes: `batch seq, batch seq, batch seq -> batch seq vocab`.
    """
    batch, length = noised.shape
    positions = torch.arange(length, device=noised.device).repeat(2).expand(batch, -1)
    causal = introspect.finished_blocks(without_wrapper(model)) == "causal"
    sees = training_mask(length, block_size, finished_causal=causal, device=noised.device)
    there = None if attention_mask is None else torch.cat([attention_mask, attention_mask], dim=1)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    mask = added_to_scores(sees, there, dtype).expand(batch, -1, -1, -1)
    output = model(input_ids=torch.cat([noised, clean], dim=1), attention_mask=mask, position_ids=positions)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits[:, :length]


def require_positions(module: nn.Module) -> None:
    """Raises: RevprobeError, for a module that cannot be told where its tokens stand."""
    inner = without_wrapper(module)
    parameters = inspect.signature(inner.forward).parameters.values()
    if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in parameters):
        raise RevprobeError(
            f"{type(inner).__name__} takes no position_ids, so a noised and a clean copy cannot stand at the same "
            "positions, as training in blocks wants it; load it with bidirectional=True, or let forward take them"
        )


def require_one_block(model: ProbedModel, what: str) -> None:
    """Raises: RevprobeError, for a model of random tokens or in blocks, whose objective `what` cannot take apart."""
    model.require_mask_token(what)
    if model.block_size is not None:
        raise RevprobeError(
            f"{what} takes the loss of one masked sequence apart, but {model.name} is trained in blocks of "
            f"{model.block_size}, a noised copy beside a clean one; ask model.in_blocks(None) for the whole text"
        )
