"""Models of one shape as one: stacked weights, one forward pass through torch.func, and the way back to each model.

Shapes below: models, batch, seq.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, get_scheduler
from transformers.modeling_outputs import MaskedLMOutput

from ...models.bases.configs import RaddConfig
from ...models.bases.positions import alibi_bias, rope_tables, signed_offsets
from ...models.bases.radd import RaddForMaskedLM
from .ema import MovingAverage
from .objectives import causal_loss, price_masks
from .trainer import ForwardOnlyTrainer


class _AnyEncoding(RaddForMaskedLM):
    """RADD with its position encoding as inputs, so that models of different encodings run as one.

    Args of forward, for one model: `rope`, cos and sin (1 and 0 leave a model unrotated); `bias`, added to the scores;
    `uses_table` and `uses_offsets`, 1 where the learned position vectors, or the learned bias of each offset, are added
    and 0 where not.
    """

    def __init__(self, config: RaddConfig) -> None:
        super().__init__(config)
        self.embed_offsets = nn.Embedding(2 * config.max_length - 1, config.n_heads)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        rope: tuple[Tensor, Tensor],
        bias: Tensor,
        uses_table: Tensor,
        uses_offsets: Tensor,
    ) -> MaskedLMOutput:
        hidden = self.embed_tokens(input_ids) + uses_table * self.embed_positions.weight[: input_ids.shape[1]]
        hidden = self.dropout(hidden)
        positions = torch.arange(input_ids.shape[1], device=hidden.device)[None]
        offsets = signed_offsets(positions, self.config.max_length)
        bias = bias + uses_offsets * self.embed_offsets(offsets).permute(0, 3, 1, 2)
        for block in self.blocks:
            hidden = block(hidden, rope, bias)
        logits = self.lm_head(self.final_norm(hidden))
        is_mask = torch.arange(self.config.vocab_size, device=logits.device) == self.config.mask_token_id
        return MaskedLMOutput(logits=logits.masked_fill(is_mask, float("-inf")))


class StackedModels:
    """Models of one family and shape, their weights stacked along a new first axis.

    Attributes:
        base: a module of that shape; its own weights are never used.
        names, weights: the parameters, `models ...` each; a tied parameter once. A model without learned positions has
            zeros there, which no step moves.
    """

    def __init__(self, models: Sequence[PreTrainedModel], mask_token_id: int | None, per: str = "token") -> None:
        self.count, self.mask_token_id, self.per = len(models), mask_token_id, per
        self.device = models[0].device
        self.base = self._base(models[0])
        shapes = {name: parameter.shape for name, parameter in self.base.named_parameters()}
        self.names = list(shapes)
        own = [dict(model.named_parameters()) for model in models]
        zeros = {name: torch.zeros(shape, device=self.device) for name, shape in shapes.items()}
        self.weights = nn.ParameterList(
            torch.stack([parameters.get(name, zeros[name]).detach() for parameters in own]) for name in self.names
        )
        self._encodings = self._stack_encodings([model.config for model in models])

    def losses(self, token_ids: Tensor, weights: Tensor, *masks: Tensor) -> Tensor:
        """Each model's loss on its own rows, whose terms have weights.

        Shapes: `models batch seq, models batch seq, models batch, models batch seq (bool) -> models`; causal models
        take no masks.
        """
        stacked = dict(zip(self.names, self.weights, strict=True))
        one = self._causal if self.mask_token_id is None else self._masked
        # The math kernel is the one that batches over models; dropout differs between them as between separate runs.
        with sdpa_kernel(SDPBackend.MATH):
            inputs = (token_ids, weights, *masks)
            batched: Tensor = torch.vmap(one, randomness="different")(stacked, self._encodings, *inputs)
        return batched

    def optimizer(self, trainers: Sequence[ForwardOnlyTrainer]) -> tuple[Optimizer, LRScheduler]:
        """The trainers' own optimizer and schedule over the stack, at the state they are in."""
        first, args = trainers[0], trainers[0].args
        decayed = set(first.get_decay_parameter_names(self.base))
        named = list(zip(self.names, self.weights, strict=True))
        groups = [
            {"params": [w for name, w in named if name in decayed], "weight_decay": args.weight_decay},
            {"params": [w for name, w in named if name not in decayed], "weight_decay": 0.0},
        ]
        kind, options = first.get_optimizer_cls_and_kwargs(args)
        optimizer: Optimizer = kind(groups, **options)
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps
        )
        for weight, state in zip(self.weights, self._stack_states(trainers), strict=True):
            optimizer.state[weight] = state
        assert first.lr_scheduler is not None and first.optimizer is not None, "made when the run was opened"
        scheduler.load_state_dict(copy.deepcopy(first.lr_scheduler.state_dict()))
        _copy_rates(first.optimizer, optimizer)
        return optimizer, scheduler

    def average(self, averages: Sequence[MovingAverage | None], *, updates: int) -> MovingAverage | None:
        """The models' moving averages as one over the stack; None where they keep none."""
        first = averages[0]
        if first is None:
            return None
        stacked = MovingAverage(self.weights, first.decay)
        own = [dict(average.module.named_parameters()) for average in averages if average is not None]
        with torch.no_grad():
            for name, weight in zip(self.names, stacked.module.parameters(), strict=True):
                for place, parameters in enumerate(own):
                    if name in parameters:
                        weight[place] = parameters[name]
        stacked.n_averaged.fill_(updates)
        return stacked

    @torch.no_grad()
    def unstack_weights(self, stacked: Any, place: int, model: nn.Module) -> None:
        """Copy one model's slice of `stacked` (the weights, or their averages) into `model`."""
        slices = dict(zip(self.names, stacked, strict=True))
        for name, parameter in model.named_parameters():
            parameter.copy_(slices[name][place])

    def unstack(self, place: int, trainer: ForwardOnlyTrainer, optimizer: Optimizer) -> None:
        """Copy one model's weights and optimizer state into its trainer."""
        assert trainer.model is not None and trainer.optimizer is not None, "made when the run was opened"
        self.unstack_weights(self.weights, place, trainer.model)
        stacked = dict(zip(self.names, self.weights, strict=True))
        for name, parameter in trainer.model.named_parameters():
            state = optimizer.state.get(stacked[name], {})
            trainer.optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value[place].clone() for key, value in state.items()
            }
        _copy_rates(optimizer, trainer.optimizer)

    def _masked(
        self,
        parameters: dict[str, Tensor],
        encoding: dict[str, Any],
        token_ids: Tensor,
        weights: Tensor,
        rate: Tensor,
        is_masked: Tensor,
    ) -> Tensor:
        assert self.mask_token_id is not None, "only masked models come here"
        visible = token_ids.masked_fill(is_masked, self.mask_token_id)
        logits = functional_call(self.base, parameters, (visible,), encoding).logits
        divisor = 1 if self.per == "sequence" else None
        return price_masks(logits, token_ids, is_masked, rate, divisor, weights).mean()

    def _causal(
        self, parameters: dict[str, Tensor], encoding: dict[str, Any], token_ids: Tensor, weights: Tensor
    ) -> Tensor:
        def model(**inputs: Tensor) -> Any:
            return functional_call(self.base, parameters, (), inputs)

        return causal_loss(model, token_ids, per=self.per, weights=weights)  # type: ignore[arg-type]  # called like a module, which is all it needs

    def _base(self, model: PreTrainedModel) -> PreTrainedModel:
        config: Any = copy.deepcopy(model.config)
        if isinstance(model, RaddForMaskedLM):
            config.position_encoding = "absolute"  # so that there is a table of position vectors
            return _on(_AnyEncoding(config), self.device)
        # Both make transformers look at values or keep keys, which a batched forward pass cannot.
        config.use_cache, config.pad_token_id = False, None
        return _on(type(model)(config), self.device)

    def _stack_states(self, trainers: Sequence[ForwardOnlyTrainer]) -> Iterator[dict[str, Tensor]]:
        """The optimizers' state of each parameter, stacked: zeros where a model lacks it, empty before a step."""
        states: list[dict[str, dict[str, Tensor]]] = []
        for trainer in trainers:
            assert trainer.model is not None and trainer.optimizer is not None, "made when the run was opened"
            parameters = trainer.model.named_parameters()
            states.append({name: trainer.optimizer.state.get(p, {}) for name, p in parameters})
        for name in self.names:
            own = [state.get(name, {}) for state in states]
            known = next((state for state in own if state), {})
            yield {
                key: value.clone() if key == "step" else torch.stack([s.get(key, torch.zeros_like(value)) for s in own])
                for key, value in known.items()
            }

    def _stack_encodings(self, configs: Sequence[Any]) -> dict[str, Any]:
        """What tells the models' encodings apart, stacked; empty for a family that has one encoding."""
        if not isinstance(configs[0], RaddConfig):
            return {}
        rope, bias = [], []
        for config in configs:
            length, head_dim = config.max_length, config.d_model // config.n_heads
            positions = torch.arange(length, device=self.device)[None]
            still = torch.ones(1, length, head_dim, device=self.device)
            turned = rope_tables(config, positions)
            rope.append(turned if config.position_encoding == "rope" else (still, torch.zeros_like(still)))
            slopes = alibi_bias(config.n_heads, positions, dtype=torch.float32)
            bias.append(slopes if config.position_encoding == "alibi" else torch.zeros_like(slopes))
        uses = {
            name: torch.tensor([float(config.position_encoding == own) for config in configs], device=self.device)
            for name, own in (("uses_table", "absolute"), ("uses_offsets", "scalar"))
        }
        return {
            "rope": (torch.stack([cos for cos, _ in rope]), torch.stack([sin for _, sin in rope])),
            "bias": torch.stack(bias),
            **uses,
        }


@torch.no_grad()
def clip_each(weights: Sequence[nn.Parameter] | nn.ParameterList, limits: Tensor) -> Tensor:
    """Scale each model's gradient to a norm of at most its limit, as `clip_grad_norm_` does for one model.

    Shapes: `models ...` each, `models -> models` (the norms before).
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    scale = (limits / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
    return norms


def _on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    nn.Module.to(model, device)  # transformers' own wrapper of it is untyped
    return model


def _copy_rates(source: Optimizer, target: Optimizer) -> None:
    """The schedule writes the rate of the next step into the optimizer, where a saved one keeps it."""
    for own, group in zip(target.param_groups, source.param_groups, strict=True):
        own["lr"] = group["lr"]
