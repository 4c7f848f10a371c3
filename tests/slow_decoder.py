"""A decoder of transformers' kind, in float64, one head and one row at a time; and checkpoints of any size to hold
against it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Sees = Callable[[int, int], bool]  # whether query i sees key j


def plain_frequencies(dim: int, base: float) -> Tensor:
    """Radians per token of each plane of a head."""
    return base ** (-torch.arange(dim // 2, dtype=torch.float64) * 2 / dim)


def yarn_frequencies(dim: int, base: float, factor: float, original: int, fast: float = 32, slow: float = 1) -> Tensor:
    """YaRN's: planes that turn more than `fast` times over the original length stay, those below `slow` are slowed down
    by the factor, and between them the share rises along the planes.

    Source: Peng et al. 2023 (arXiv 2309.00071), Sec. 3.2, with the planes' bounds rounded outwards as in its code.
    """
    plane = [dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (fast, slow)]
    low, high = max(math.floor(plane[0]), 0), min(math.ceil(plane[1]), dim - 1)
    made = []
    for k, plain in enumerate(plain_frequencies(dim, base).tolist()):
        share = min(max((k - low) / (high - low or 0.001), 0.0), 1.0)
        made.append(plain / factor * share + plain * (1 - share))
    return torch.tensor(made, dtype=torch.float64)


def slow_logits(
    weights: Mapping[str, Tensor],
    config: Mapping,
    ids: Sequence[int],
    sees: Sees,
    positions: Sequence[int],
    *,
    frequencies: Tensor | None = None,
    stretched: float = 1.0,
    query_scale: Callable[[int], float] = lambda position: 1.0,
) -> Tensor:
    """Logits of a Llama, Qwen2 or Qwen3: whichever of its biases and norms the weights have. Shapes: `-> seq vocab`.

    Args:
        frequencies: plain ones of the config's base when None.
        stretched: what turned queries and keys are multiplied by (YaRN's attention factor).
        query_scale: what a query at a position is multiplied by.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    turns = plain_frequencies(dim, float(config["rope_theta"])) if frequencies is None else frequencies
    states = w["model.embed_tokens.weight"][list(ids)]
    for n in range(config["num_hidden_layers"]):
        at, eps = f"model.layers.{n}.", config["rms_norm_eps"]
        normed = _rms(states, w[f"{at}input_layernorm.weight"], eps)
        made = {letter: _linear(w, f"{at}self_attn.{letter}_proj", normed) for letter in "qkv"}
        mixed = torch.zeros(len(ids), heads * dim, dtype=torch.float64)
        for head in range(heads):
            own, shared = slice(head * dim, head * dim + dim), head // (heads // groups)
            group = slice(shared * dim, shared * dim + dim)
            query, key, value = made["q"][:, own], made["k"][:, group], made["v"][:, group]
            if f"{at}self_attn.q_norm.weight" in w:
                query = _rms(query, w[f"{at}self_attn.q_norm.weight"], eps)
                key = _rms(key, w[f"{at}self_attn.k_norm.weight"], eps)
            query, key = (
                torch.stack([_turned(row, p, turns) * stretched for row, p in zip(rows, positions, strict=True)])
                for rows in (query, key)
            )
            for i in range(len(ids)):
                seen = [j for j in range(len(ids)) if sees(i, j)]
                scores = torch.stack([query[i] * query_scale(positions[i]) @ key[j] for j in seen]) / math.sqrt(dim)
                mixed[i, own] = scores.softmax(0) @ value[seen]
        states = states + mixed @ w[f"{at}self_attn.o_proj.weight"].T
        normed = _rms(states, w[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = (normed @ w[f"{at}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        states = states + (gate * gate.sigmoid() * up) @ w[f"{at}mlp.down_proj.weight"].T
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _rms(states, w["model.norm.weight"], config["rms_norm_eps"]) @ head.T


def _linear(w: Mapping[str, Tensor], name: str, states: Tensor) -> Tensor:
    return states @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def _rms(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turned(vector: Tensor, position: int, frequencies: Tensor) -> Tensor:
    """Plane k is entries k and k + d/2."""
    half, angles = len(vector) // 2, position * frequencies
    a, b = vector[:half], vector[half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])


def pick(*values):
    """One of them, by torch's generator."""
    return values[int(torch.randint(len(values), ()))]


def draw_checkpoint(seed: int, kind: str, **settings: object) -> tuple[dict[str, Tensor], dict]:
    """Weights and config of random sizes, as transformers' Llama ("llama"), Qwen2 ("qwen2") or Qwen3 ("qwen3") has
    them; torch's generator stands at the seed's next number then.

    Args:
        settings: of the config, instead of what is drawn, and beside it.
    """
    torch.manual_seed(seed)
    groups, per, dim = pick(1, 2, 3), pick(1, 2, 3), pick(4, 6, 8)
    heads, layers, rows, tied = groups * per, pick(1, 2, 3), pick(61, 136), pick(True, False)
    own_dim = kind == "qwen3" or "head_dim" in settings
    config = {
        "hidden_size": pick(20, 48) if own_dim else heads * dim,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "num_hidden_layers": layers,
        "intermediate_size": pick(24, 40),
        "vocab_size": rows,
        "rms_norm_eps": pick(1e-5, 1e-6),
        "rope_theta": pick(10000.0, 1000000, 500000.0),
        "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    } | ({"head_dim": dim} if own_dim else {})
    config |= {key: value for key, value in settings.items() if key != "head_dim"}
    shapes = _shapes(config, kind)
    weights = {name: torch.randn(shape) * 0.35 + (len(shape) == 1 and "norm" in name) for name, shape in shapes.items()}
    return weights, config


def _shapes(config: Mapping, kind: str) -> dict[str, tuple[int, ...]]:
    width, inner, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or width // heads
    shapes = {"model.embed_tokens.weight": (rows, width), "model.norm.weight": (width,)}
    shapes |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (rows, width)}
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        shapes |= {f"{at}{norm}.weight": (width,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for letter, count in zip("qkv", (heads, groups, groups), strict=True):
            shapes[f"{at}self_attn.{letter}_proj.weight"] = (count * dim, width)
            if kind == "qwen2":
                shapes[f"{at}self_attn.{letter}_proj.bias"] = (count * dim,)
        shapes[f"{at}self_attn.o_proj.weight"] = (width, heads * dim)
        if kind == "qwen3":
            shapes |= {f"{at}self_attn.{letter}_norm.weight": (dim,) for letter in "qk"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (inner, width) for part in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (width, inner)
    return shapes


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor], config: Mapping) -> Path:
    """A folder as a user downloads it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
    return folder
