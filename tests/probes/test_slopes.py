"""Slopes of losses are the gradient's products, whatever a module returns beside its logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revprobe import ProbedModel
from revprobe.probes.pairs.query import Query
from revprobe.probes.passes.slopes import loss_slopes
from tiny import drawn

QUERIES = [Query([3, 7, 9, 11, 13], [1], [3]), Query([5, 8, 1, 30, 31], [3], [1])]


class Own(nn.Module):
    """Neither a config nor `get_input_embeddings`; `gives` makes the output of states and logits."""

    def __init__(self, gives) -> None:
        super().__init__()
        self.words, self.mix, self.head, self.gives = nn.Embedding(56, 8), nn.Linear(8, 8), nn.Linear(8, 56), gives

    def forward(self, input_ids: torch.Tensor) -> object:
        x = self.words(input_ids)
        x = x + torch.tanh(self.mix(x.mean(1, keepdim=True)))
        return self.gives(x, self.head(x))


OUTPUTS = {
    "a tensor": lambda x, logits: logits,
    "states before logits": lambda x, logits: (x, logits),
    "a mapping": lambda x, logits: {"states": x, "logits": logits},
}


@pytest.mark.parametrize("gives", OUTPUTS.values(), ids=OUTPUTS)
def test_slopes_of_a_module_of_ones_own_are_products_with_plain_gradients(gives) -> None:
    module = drawn(lambda: Own(gives), scale=0.5)
    model = ProbedModel(module, objective="masked", mask_token_id=53, logit_shift=0)
    along = {name: torch.randn_like(p) for name, p in module.named_parameters()}
    found = loss_slopes(model, QUERIES, [along])
    for n, query in enumerate(QUERIES):
        ids = torch.tensor([query.token_ids])
        at = query.target_positions[0]
        target, ids[0, at] = ids[0, at].clone(), 53
        x = module.words(ids)
        x = x + torch.tanh(module.mix(x.mean(1, keepdim=True)))
        loss = F.cross_entropy(module.head(x)[0, at], target)
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, along.values(), strict=True))
        assert found.loss[n] == pytest.approx(float(loss), abs=1e-5)
        assert found.slope[0, n] == pytest.approx(slope, rel=1e-4)
