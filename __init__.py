"""Measure how a language model stores a relation and how it routes to it when the question is asked backwards.

    import revprobe as rp
    model = rp.load_model("runs/one-layer-quick/rope-l10-s0", weights="ema")
    rp.probe(model, rp.letter_pairs(length=10, model=model)).plot()

Importing the package registers RADD with transformers' Auto classes, and that alone. Every public name is imported
when it is first used (PEP 562), so the Trainer, peft and TransformerLens load only for those who need them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Before the first relative import: modules that write the version into their readings import it from here.
__version__ = "0.1.0"

# Eager on purpose: AutoModelForMaskedLM.from_pretrained must know the class after a bare `import revprobe`.
from .models.radd import RaddConfig, RaddForMaskedLM

if TYPE_CHECKING:  # what type checkers and editors see; a test holds it equal to _EXPORTS
    from .errors import RevprobeError
    from .finetune.analysis.one_step import one_step, one_step_curves
    from .finetune.analysis.storage_curves import storage_curves
    from .finetune.config.finetuning import FinetuneConfig
    from .finetune.config.one_layer import RunConfig, SweepConfig
    from .finetune.memory.plan import plan_memory
    from .finetune.runs.finetuning import fine_tune
    from .finetune.runs.one_layer import train
    from .finetune.runs.open import open_run
    from .finetune.runs.sweeps import open_sweep
    from .finetune.training.prediction_callback import FirstOrderPrediction
    from .finetune.training.probe_callback import ProbeCallback
    from .models.one_layer import letter_tokenizer, one_layer_gpt2
    from .models.probed import ProbedModel
    from .models.registry import list_models, load_model, register_model
    from .models.structure import declare_fused
    from .probes.attention import probe_attention_correlation
    from .probes.decoding.decode import decode
    from .probes.decoding.exact_match import decoded_match
    from .probes.edits import edit_attention
    from .probes.figures.plot import save_figure
    from .probes.figures.token_strip import token_strip
    from .probes.fused import probe
    from .probes.gradient import probe_gradient_cosine
    from .probes.pairs.pairs import ReversalPairs
    from .probes.pairs.query import Query, ReversalPair
    from .probes.pairs.text import pair_from_text, pairs_from_frame
    from .probes.probability import probe_reverse_probability
    from .probes.readings.readings import Reading, Readings
    from .probes.route_edit import probe_route_edit
    from .probes.statistics.by_part import logit_contributions
    from .probes.statistics.estimators import Control
    from .probes.storage import probe_stored_evidence
    from .probes.theory.gradient_flow import rope_transfer_condition, simulate_alibi_transfer, simulate_rope_transfer
    from .probes.theory.model_bounds import model_frequencies, model_theory, with_bounds
    from .probes.theory.score_correlation import (
        alibi_correlation,
        rope_asymmetric_bound,
        rope_conditional_correlation,
        rope_correlation_bound,
        rope_correlation_tail,
        rope_limit_bound,
        rope_query_bound,
    )
    from .probes.theory.storage_gradient import storage_gradient_cosines
    from .probes.theory.tables import theory_tables
    from .probes.theory.two_route_toy import TwoRouteToy
    from .probes.token_contributions import token_contributions
    from .relations.catalog import from_table, invented_names, parent_child, person_description, trex
    from .relations.letters import letter_pairs, letters
    from .relations.text_relation import Question, TextRelation
    from .report.run_sweep import run_sweep
    from .report.summary.compare import compare

_EXPORTS = {
    "Control": ".probes.statistics.estimators",
    "FinetuneConfig": ".finetune.config.finetuning",
    "FirstOrderPrediction": ".finetune.training.prediction_callback",
    "ProbeCallback": ".finetune.training.probe_callback",
    "ProbedModel": ".models.probed",
    "Query": ".probes.pairs.query",
    "Question": ".relations.text_relation",
    "RaddConfig": ".models.radd",
    "RaddForMaskedLM": ".models.radd",
    "Reading": ".probes.readings.readings",
    "Readings": ".probes.readings.readings",
    "ReversalPair": ".probes.pairs.query",
    "ReversalPairs": ".probes.pairs.pairs",
    "RevprobeError": ".errors",
    "RunConfig": ".finetune.config.one_layer",
    "SweepConfig": ".finetune.config.one_layer",
    "TextRelation": ".relations.text_relation",
    "TwoRouteToy": ".probes.theory.two_route_toy",
    "alibi_correlation": ".probes.theory.score_correlation",
    "compare": ".report.summary.compare",
    "declare_fused": ".models.structure",
    "decode": ".probes.decoding.decode",
    "decoded_match": ".probes.decoding.exact_match",
    "edit_attention": ".probes.edits",
    "fine_tune": ".finetune.runs.finetuning",
    "from_table": ".relations.catalog",
    "invented_names": ".relations.catalog",
    "letter_pairs": ".relations.letters",
    "letter_tokenizer": ".models.one_layer",
    "letters": ".relations.letters",
    "list_models": ".models.registry",
    "load_model": ".models.registry",
    "logit_contributions": ".probes.statistics.by_part",
    "model_frequencies": ".probes.theory.model_bounds",
    "model_theory": ".probes.theory.model_bounds",
    "one_layer_gpt2": ".models.one_layer",
    "one_step": ".finetune.analysis.one_step",
    "one_step_curves": ".finetune.analysis.one_step",
    "open_run": ".finetune.runs.open",
    "open_sweep": ".finetune.runs.sweeps",
    "pair_from_text": ".probes.pairs.text",
    "pairs_from_frame": ".probes.pairs.text",
    "parent_child": ".relations.catalog",
    "person_description": ".relations.catalog",
    "plan_memory": ".finetune.memory.plan",
    "probe": ".probes.fused",
    "probe_attention_correlation": ".probes.attention",
    "probe_gradient_cosine": ".probes.gradient",
    "probe_reverse_probability": ".probes.probability",
    "probe_route_edit": ".probes.route_edit",
    "probe_stored_evidence": ".probes.storage",
    "register_model": ".models.registry",
    "rope_asymmetric_bound": ".probes.theory.score_correlation",
    "rope_conditional_correlation": ".probes.theory.score_correlation",
    "rope_correlation_bound": ".probes.theory.score_correlation",
    "rope_correlation_tail": ".probes.theory.score_correlation",
    "rope_limit_bound": ".probes.theory.score_correlation",
    "rope_query_bound": ".probes.theory.score_correlation",
    "rope_transfer_condition": ".probes.theory.gradient_flow",
    "run_sweep": ".report.run_sweep",
    "save_figure": ".probes.figures.plot",
    "simulate_alibi_transfer": ".probes.theory.gradient_flow",
    "simulate_rope_transfer": ".probes.theory.gradient_flow",
    "storage_curves": ".finetune.analysis.storage_curves",
    "storage_gradient_cosines": ".probes.theory.storage_gradient",
    "theory_tables": ".probes.theory.tables",
    "token_contributions": ".probes.token_contributions",
    "token_strip": ".probes.figures.token_strip",
    "train": ".finetune.runs.one_layer",
    "trex": ".relations.catalog",
    "with_bounds": ".probes.theory.model_bounds",
}

__all__ = [
    "Control",
    "FinetuneConfig",
    "FirstOrderPrediction",
    "ProbeCallback",
    "ProbedModel",
    "Query",
    "Question",
    "RaddConfig",
    "RaddForMaskedLM",
    "Reading",
    "Readings",
    "ReversalPair",
    "ReversalPairs",
    "RevprobeError",
    "RunConfig",
    "SweepConfig",
    "TextRelation",
    "TwoRouteToy",
    "__version__",
    "alibi_correlation",
    "compare",
    "declare_fused",
    "decode",
    "decoded_match",
    "edit_attention",
    "fine_tune",
    "from_table",
    "invented_names",
    "letter_pairs",
    "letter_tokenizer",
    "letters",
    "list_models",
    "load_model",
    "logit_contributions",
    "model_frequencies",
    "model_theory",
    "one_layer_gpt2",
    "one_step",
    "one_step_curves",
    "open_run",
    "open_sweep",
    "pair_from_text",
    "pairs_from_frame",
    "parent_child",
    "person_description",
    "plan_memory",
    "probe",
    "probe_attention_correlation",
    "probe_gradient_cosine",
    "probe_reverse_probability",
    "probe_route_edit",
    "probe_stored_evidence",
    "register_model",
    "rope_asymmetric_bound",
    "rope_conditional_correlation",
    "rope_correlation_bound",
    "rope_correlation_tail",
    "rope_limit_bound",
    "rope_query_bound",
    "rope_transfer_condition",
    "run_sweep",
    "save_figure",
    "simulate_alibi_transfer",
    "simulate_rope_transfer",
    "storage_curves",
    "storage_gradient_cosines",
    "theory_tables",
    "token_contributions",
    "token_strip",
    "train",
    "trex",
    "with_bounds",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use, and keep it.

    Raises: AttributeError, when the name is not public; it names the nearest one that is.
    """
    if name not in _EXPORTS:
        from .errors import did_you_mean

        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{did_you_mean(name, __all__)}")
    value = getattr(import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
