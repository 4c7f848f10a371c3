"""DiffusionGemma once more, slowly: one sequence at a time in float64, an encoder and then a decoder, head by head.

Written from what the published layout says; it shares nothing with the code under test but the tensors of a checkpoint.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class SlowGemma:
    """`tensors`: a checkpoint's, by their published names; `config`: its config.json, sizes in `text_config`."""

    tensors: Mapping[str, Tensor]
    config: Mapping
    scores: dict[int, Tensor] = field(default_factory=dict)

    def canvas(self, prompt: Tensor, canvas: Tensor) -> Tensor:
        """Logits of the canvas; `scores` then has those of its rows, -inf where a token is not seen.

        Shapes: `prompt, canvas -> canvas vocab`; `scores`: layer -> `heads canvas (prompt canvas)`.
        """
        keys, values = self._encode(prompt)
        hidden = self._embed(canvas)
        hidden = hidden / (hidden.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()  # conditioned on nothing
        places = torch.arange(len(prompt), len(prompt) + len(canvas))
        for layer in range(self.text["num_hidden_layers"]):
            window = self.text["sliding_window"] - 1 if self._slides(layer) else len(prompt)
            hidden_keys = max(len(prompt) - window, 0)
            sees = torch.ones(len(canvas), len(prompt) + len(canvas), dtype=torch.bool)
            sees[:, :hidden_keys] = False
            hidden = self._layer(layer, hidden, places, sees, (keys[layer], values[layer]), "decoder")
        hidden = self._norm(hidden, "model.decoder.norm.weight")
        cap = self.text["final_logit_softcapping"]
        return cap * torch.tanh(hidden @ self._get("model.decoder.embed_tokens.weight").T / cap)

    def _encode(self, prompt: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The keys and values of every layer. Shapes: `prompt -> heads prompt dim` each."""
        hidden, places = self._embed(prompt), torch.arange(len(prompt))
        keys, values = [], []
        for layer in range(self.text["num_hidden_layers"]):
            back = places[:, None] - places[None, :]
            sees = back >= 0
            if self._slides(layer):
                sees &= back < self.text["sliding_window"]
            normed = self._norm(hidden, f"{self._path(layer)}.input_layernorm.weight")
            key, value = self._keys(layer, normed, places)
            keys.append(key)
            values.append(value)
            hidden = self._layer(layer, hidden, places, sees, None, "encoder.language_model")
        return keys, values

    def _layer(self, layer, hidden, places, sees, cached, stream: str) -> Tensor:
        path = self._path(layer)
        normed = self._norm(hidden, f"{path}.input_layernorm.weight")
        query = self._turned(self._heads(layer, normed, "q"), places, layer)
        key, value = self._keys(layer, normed, places)
        if cached is not None:
            key, value = torch.cat([cached[0], key], 1), torch.cat([cached[1], value], 1)
        shared = len(query) // len(key)
        mixed, scores = [], []
        for head in range(len(query)):
            score = (query[head] @ key[head // shared].T).masked_fill(~sees, -torch.inf)
            scores.append(score)
            mixed.append(score.softmax(-1) @ value[head // shared])
        if cached is not None:
            self.scores[layer] = torch.stack(scores)
        attended = torch.cat(mixed, -1) @ self._get(f"{path}.self_attn.o_proj.weight").T
        hidden = hidden + self._norm(attended, f"{path}.post_attention_layernorm.weight")
        dense = self._dense(path, self._norm(hidden, f"{path}.pre_feedforward_layernorm.weight"))
        dense = self._norm(dense, f"{path}.post_feedforward_layernorm_1.weight")
        experts = self._norm(self._experts(path, hidden), f"{path}.post_feedforward_layernorm_2.weight")
        both = self._norm(dense + experts, f"{path}.post_feedforward_layernorm.weight")
        return (hidden + both) * self._get(f"model.{stream}.layers.{layer}.layer_scalar")

    def _dense(self, path: str, given: Tensor) -> Tensor:
        gate, up, down = (self._get(f"{path}.mlp.{part}_proj.weight").T for part in ("gate", "up", "down"))
        return (F.gelu(given @ gate, approximate="tanh") * (given @ up)) @ down

    def _experts(self, path: str, hidden: Tensor) -> Tensor:
        """Token by token, expert by expert."""
        given = self._norm(hidden, f"{path}.pre_feedforward_layernorm_2.weight")
        routed = self._norm(hidden) * self._get(f"{path}.router.scale") / math.sqrt(hidden.shape[-1])
        chances = (routed @ self._get(f"{path}.router.proj.weight").T).softmax(-1)
        out = torch.zeros_like(hidden)
        for token, chance in enumerate(chances):
            chosen = chance.argsort(descending=True)[: self.text["top_k_experts"]].tolist()
            for expert in chosen:
                share = chance[expert] / chance[chosen].sum() * self._get(f"{path}.router.per_expert_scale")[expert]
                gate, up = (self._get(f"{path}.experts.gate_up_proj")[expert] @ given[token]).chunk(2)
                inner = F.gelu(gate, approximate="tanh") * up
                out[token] = out[token] + share * (self._get(f"{path}.experts.down_proj")[expert] @ inner)
        return out

    def _keys(self, layer: int, normed: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        key = self._turned(self._heads(layer, normed, "k"), places, layer)
        projected = self._heads(layer, normed, "v" if self._slides(layer) else "k", normalised=False)
        return key, self._norm(projected)

    def _heads(self, layer: int, normed: Tensor, part: str, *, normalised: bool = True) -> Tensor:
        """Shapes: `seq width -> heads seq dim`."""
        path = f"{self._path(layer)}.self_attn"
        dim = len(self._get(f"{path}.q_norm.weight"))
        split = (normed @ self._get(f"{path}.{part}_proj.weight").T).unflatten(-1, (-1, dim)).transpose(0, 1)
        return self._norm(split, f"{path}.{part}_norm.weight") if normalised else split

    def _turned(self, heads: Tensor, places: Tensor, layer: int) -> Tensor:
        """Plane k is entries k and k + dim/2; in full layers only the first of them turn, at the whole head's rates."""
        rope = self.text["rope_parameters"][self.text["layer_types"][layer]]
        half = heads.shape[-1] // 2
        turning = int(rope.get("partial_rotary_factor", 1.0) * heads.shape[-1] // 2)
        rates = torch.tensor([rope["rope_theta"] ** (-2 * k / heads.shape[-1]) for k in range(turning)]).double()
        angle = torch.zeros(len(places), half, dtype=torch.float64)
        angle[:, :turning] = places[:, None] * rates
        one, other = heads[..., :half], heads[..., half:]
        turned = one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()
        return torch.cat(turned, -1)

    @property
    def text(self) -> Mapping:
        return self.config["text_config"]

    @property
    def eps(self) -> float:
        return self.text["rms_norm_eps"]

    def _slides(self, layer: int) -> bool:
        return self.text["layer_types"][layer] == "sliding_attention"

    def _path(self, layer: int) -> str:
        return f"model.decoder.layers.{layer}"

    def _get(self, name: str) -> Tensor:
        return self.tensors[name].double()

    def _embed(self, ids: Tensor) -> Tensor:
        return self._get("model.decoder.embed_tokens.weight")[ids] * math.sqrt(self.text["hidden_size"])

    def _norm(self, given: Tensor, name: str | None = None) -> Tensor:
        normed = given / (given.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        return normed if name is None else normed * self._get(name)
