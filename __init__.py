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
    from .finetune.compare import compare
    from .finetune.config import RunConfig, SweepConfig
    from .finetune.decoding import decode
    from .finetune.finetune_config import FinetuneConfig
    from .finetune.finetuning import fine_tune
    from .finetune.letters_relation import letter_pairs, letters
    from .finetune.memory_plan import plan_memory
    from .finetune.one_step import one_step, one_step_curves
    from .finetune.prediction import FirstOrderPrediction
    from .finetune.relations import from_table, invented_names, parent_child, person_description, trex
    from .finetune.runs import open_run, train
    from .finetune.scoring import decoded_match
    from .finetune.snapshots import ProbeCallback
    from .finetune.storage_curves import storage_curves
    from .finetune.sweeps import open_sweep, run_sweep
    from .finetune.text_relations import Question, TextRelation
    from .models.gpt2 import one_layer_gpt2
    from .models.layouts import declare_fused
    from .models.letters import letter_tokenizer
    from .models.probed import ProbedModel
    from .models.registry import list_models, load_model, register_model
    from .probes.attention import probe_attention_correlation
    from .probes.edits import edit_attention
    from .probes.estimates import Control
    from .probes.export import save_figure
    from .probes.fused import probe
    from .probes.gradient import probe_gradient_cosine
    from .probes.gradient_flow import rope_transfer_condition, simulate_alibi_transfer, simulate_rope_transfer
    from .probes.gradient_terms import TwoRouteToy
    from .probes.model_theory import model_frequencies, model_theory, with_bounds
    from .probes.pairs import Query, ReversalPair, ReversalPairs
    from .probes.probability import probe_reverse_probability
    from .probes.readings import Reading, Readings
    from .probes.routing import probe_route_edit
    from .probes.storage import probe_stored_evidence
    from .probes.storage_gradient import storage_gradient_cosines
    from .probes.storage_tables import logit_contributions
    from .probes.text_pairs import pairs_from_frame
    from .probes.theory import (
        alibi_correlation,
        rope_asymmetric_bound,
        rope_conditional_correlation,
        rope_correlation_bound,
        rope_correlation_tail,
        rope_limit_bound,
        rope_query_bound,
    )
    from .probes.theory_tables import theory_tables
    from .probes.token_contributions import token_contributions
    from .probes.token_strip import token_strip

_EXPORTS = {
    "Control": ".probes.estimates",
    "FinetuneConfig": ".finetune.finetune_config",
    "FirstOrderPrediction": ".finetune.prediction",
    "ProbeCallback": ".finetune.snapshots",
    "ProbedModel": ".models.probed",
    "Query": ".probes.pairs",
    "Question": ".finetune.text_relations",
    "RaddConfig": ".models.radd",
    "RaddForMaskedLM": ".models.radd",
    "Reading": ".probes.readings",
    "Readings": ".probes.readings",
    "ReversalPair": ".probes.pairs",
    "ReversalPairs": ".probes.pairs",
    "RevprobeError": ".errors",
    "RunConfig": ".finetune.config",
    "SweepConfig": ".finetune.config",
    "TextRelation": ".finetune.text_relations",
    "TwoRouteToy": ".probes.gradient_terms",
    "alibi_correlation": ".probes.theory",
    "compare": ".finetune.compare",
    "declare_fused": ".models.layouts",
    "decode": ".finetune.decoding",
    "decoded_match": ".finetune.scoring",
    "edit_attention": ".probes.edits",
    "fine_tune": ".finetune.finetuning",
    "from_table": ".finetune.relations",
    "invented_names": ".finetune.relations",
    "letter_pairs": ".finetune.letters_relation",
    "letter_tokenizer": ".models.letters",
    "letters": ".finetune.letters_relation",
    "list_models": ".models.registry",
    "load_model": ".models.registry",
    "logit_contributions": ".probes.storage_tables",
    "model_frequencies": ".probes.model_theory",
    "model_theory": ".probes.model_theory",
    "one_layer_gpt2": ".models.gpt2",
    "one_step": ".finetune.one_step",
    "one_step_curves": ".finetune.one_step",
    "open_run": ".finetune.runs",
    "open_sweep": ".finetune.sweeps",
    "pairs_from_frame": ".probes.text_pairs",
    "parent_child": ".finetune.relations",
    "person_description": ".finetune.relations",
    "plan_memory": ".finetune.memory_plan",
    "probe": ".probes.fused",
    "probe_attention_correlation": ".probes.attention",
    "probe_gradient_cosine": ".probes.gradient",
    "probe_reverse_probability": ".probes.probability",
    "probe_route_edit": ".probes.routing",
    "probe_stored_evidence": ".probes.storage",
    "register_model": ".models.registry",
    "rope_asymmetric_bound": ".probes.theory",
    "rope_conditional_correlation": ".probes.theory",
    "rope_correlation_bound": ".probes.theory",
    "rope_correlation_tail": ".probes.theory",
    "rope_limit_bound": ".probes.theory",
    "rope_query_bound": ".probes.theory",
    "rope_transfer_condition": ".probes.gradient_flow",
    "run_sweep": ".finetune.sweeps",
    "save_figure": ".probes.export",
    "simulate_alibi_transfer": ".probes.gradient_flow",
    "simulate_rope_transfer": ".probes.gradient_flow",
    "storage_curves": ".finetune.storage_curves",
    "storage_gradient_cosines": ".probes.storage_gradient",
    "theory_tables": ".probes.theory_tables",
    "token_contributions": ".probes.token_contributions",
    "token_strip": ".probes.token_strip",
    "train": ".finetune.runs",
    "trex": ".finetune.relations",
    "with_bounds": ".probes.model_theory",
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
