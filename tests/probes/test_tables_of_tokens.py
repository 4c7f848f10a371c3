"""Stored evidence is what every table that is looked up by token sends, whichever tensor the rows come out of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from long_cases import rest_long
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import revprobe as rp
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from tiny import MASK, drawn, radd

# The evidence's and the target's tokens of each fact are others; in the first fact tokens count up, as positions do.
QUERIES = [([0, 1, 2, 3], [3, 2, 1, 0])] + [([1, 10 + i, 2, 30 + i], [30 + i, 2, 10 + i, 1]) for i in range(5)]
PAIRS = rp.ReversalPairs.from_pairs(
    rp.ReversalPair(rp.Query(there, [3], [1]), rp.Query(back, [0], [2]), fact=str(fact))
    for fact, (there, back) in enumerate(QUERIES)
)
WAYS: dict[str, Callable[[nn.Embedding, Tensor], Tensor]] = {
    "module": lambda table, ids: table(ids),
    "function": lambda table, ids: F.embedding(ids, table.weight),
    "another tensor each time": lambda table, ids: F.embedding(ids, table.weight.clone()),
    "flat": lambda table, ids: F.embedding(ids.flatten(), table.weight).unflatten(0, ids.shape),
    "rows": lambda table, ids: table.weight[ids],
    "rows and all columns": lambda table, ids: table.weight[ids, :],
    "index_select": lambda table, ids: table.weight.index_select(0, ids.flatten()).unflatten(0, ids.shape),
}


class TwoTables(nn.Module):
    """One layer whose values hold rows of a second table of tokens; positions stand beside the first."""

    def __init__(self, first: str, second: str, *, named: bool) -> None:
        super().__init__()
        self.ways = WAYS[first], WAYS[second]
        self.embed, self.beside, self.places = nn.Embedding(56, 16), nn.Embedding(56, 16), nn.Embedding(64, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.unembed = nn.Linear(16, 56, bias=False)
        if named:
            self.get_input_embeddings = lambda: self.embed

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.ways[0](self.embed, input_ids) + self.places(torch.arange(input_ids.shape[1]))
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        v = v + self.ways[1](self.beside, input_ids).unflatten(-1, (2, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.unembed(x + self.o(mixed))

    def stored(self) -> np.ndarray:
        """S = W_U W_O (W_V E + E'), `vocab token`."""
        values = self.v.weight @ self.embed.weight.T + self.beside.weight.T
        return (self.unembed.weight @ self.o.weight @ values).detach().numpy()


def wrapped(module: nn.Module) -> rp.ProbedModel:
    shift = {"logit_shift": 0} if not hasattr(module, "config") else {}
    return rp.ProbedModel(module, rp.letter_tokenizer(), objective="masked", mask_token_id=MASK, **shift)


def of_sources(model: rp.ProbedModel, **options: Any) -> dict[str, float]:
    """What each source holds of the evidence in all heads: mean over pairs of both directions."""
    frame = rp.probe_stored_evidence(model, PAIRS, control=False, **options).frame
    frame = frame[frame["part"].eq("evidence")]
    summed = frame.groupby("source", observed=True)[["stored_forward", "stored_reverse"]].sum().mean(axis=1)
    return {str(source): value / len(PAIRS) for source, value in summed.items()}


@pytest.mark.parametrize("size", rest_long([None, 1]))
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize(
    ("first", "second"), [*((way, "module") for way in WAYS), *(("module", way) for way in WAYS if way != "module")]
)
def test_s_holds_what_both_tables_send_however_they_are_looked_up(
    first: str, second: str, named: bool, size: int | None
) -> None:
    model = wrapped(drawn(lambda: TwoTables(first, second, named=named), scale=0.2))
    matrix = model.module.stored()
    reading = rp.probe_stored_evidence(model, PAIRS, control=False, batch_size=size)
    by_hand = [matrix[query.target[0], query.evidence[0]] for query in (pair.reverse for pair in PAIRS)]
    assert reading.value == pytest.approx(np.mean(by_hand), abs=1e-5)
    table = rp.token_contributions(model, PAIRS[0].reverse)
    stored = table.groupby(["target", "token"])["stored"].sum()
    for (target, token), value in stored.items():
        assert value == pytest.approx(matrix[target, token], abs=1e-5), (target, token)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("kept", ["elsewhere", "as two factors"])
def test_weights_that_are_another_tensor_in_each_run_are_tokens_rows_all_the_same(kept: str, first_order: bool) -> None:
    plain = radd("rope", n_layers=2, n_heads=2, d_model=16, scale=0.3).module
    other = copy.deepcopy(plain)
    if kept == "elsewhere":
        other = accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    else:
        parametrizations.weight_norm(other.embed_tokens)
    expected, found = (of_sources(wrapped(module), first_order=first_order) for module in (plain, other))
    assert set(found) == set(expected) and abs(expected["token"]) > 1e-3 and "position" not in found
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("adapter", ["rank 2 on the embedding", "chosen tokens", "the embedding saved"])
def test_an_adapted_model_stores_what_its_merged_twin_stores(adapter: str, first_order: bool) -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 1, "mlp_hidden_size": 48}
    sizes |= {"embedding_size": 56, "vocab_size": 56, "mask_token_id": MASK, "pad_token_id": 55, "eos_token_id": 54}
    base = drawn(lambda: LLaDAForMaskedDiffusion(LLaDAConfig(**sizes)), scale=0.2)
    on = {
        "rank 2 on the embedding": {"target_modules": ["embed_tokens", "v_proj"]},
        "chosen tokens": {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [10, 11, 12, 13]}},
        "the embedding saved": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    }[adapter]
    adapted = get_peft_model(base, LoraConfig(r=2, **on))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if any(word in name for word in ("lora", "modules_to_save", "trainable_tokens")):
            parameter.data += 0.2 * torch.randn_like(parameter)
    merged = copy.deepcopy(adapted).merge_and_unload()
    found, twin = (of_sources(wrapped(module.eval()), first_order=first_order) for module in (adapted, merged))
    assert found == pytest.approx(twin, abs=1e-5) and abs(twin["token"]) > 1e-3


def test_a_table_that_is_named_and_not_looked_up_stores_nothing_that_could_be_told() -> None:
    """0 for every fact would be a number."""

    class OneHot(TwoTables):
        def __init__(self) -> None:
            super().__init__("module", "module", named=True)
            self.ways = (lambda table, ids: F.one_hot(ids, 56).float() @ table.weight,) * 2

    with pytest.raises(rp.RevprobeError, match="looks its tokens up in no table that could be seen"):
        rp.probe_stored_evidence(wrapped(drawn(OneHot, scale=0.2)), PAIRS)


def test_a_module_that_takes_its_tokens_in_one_order_alone_is_refused_in_words() -> None:
    class Ordered(TwoTables):
        def forward(self, input_ids: Tensor) -> Tensor:
            if torch.is_grad_enabled() or input_ids.shape == (1, 4):
                assert int(input_ids[0, 0]) != 3, "a 3 stands at no beginning"
            return super().forward(input_ids)

    model = wrapped(drawn(lambda: Ordered("module", "module", named=True), scale=0.2))
    with pytest.raises(rp.RevprobeError, match=r"Ordered does not run on these tokens with .*a 3 stands"):
        rp.token_contributions(model, rp.Query([0, 1, 9, 3], [2], [1]))
