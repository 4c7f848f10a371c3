"""How many facts of a table break without a carrier prefix, in a byte-level BPE vocabulary?

    python examples/carrier_check.py parent_child_pairs.csv

In byte-level BPE a name that starts a text and the same name after a space are different tokens. A reversal moves
the name that stood first to a place further on, so its forward and its reverse query would ask for different tokens.
No published vocabulary is needed: a BPE is trained on the table's own sentences, twice: once on half of the rows and
counted on the other half, whose names it has never seen, and once on everything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import revprobe as rp

FORWARD, REVERSE = "{target}'s child is {evidence}", "{evidence}'s parent is {target}"
# No name starts these, so they need no carrier; and nothing touches a name, so "Jr.'s" cannot straddle.
SPACED = ("The child of {target} is {evidence}", "The parent of {evidence} is {target}")
CARRIER = "Fact: "
BREAKING = ("different_tokens", "ambiguous_span", "straddling_span", "unreadable_span", "special_token")


def sentences(facts: pd.DataFrame, target: str, evidence: str) -> list[str]:
    """Every fact in both directions, with and without the carrier: names start texts and follow spaces."""
    rows = facts[[target, evidence]].itertuples(index=False)
    bare = [side.format(target=t, evidence=e) for t, e in rows for side in (FORWARD, REVERSE, *SPACED)]
    return [*bare, *(CARRIER + text for text in bare)]


def byte_level_bpe(texts: list[str], merges: int) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, trained here."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + 1 + merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<mask>"], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>")


def count(facts: pd.DataFrame, tokenizer: PreTrainedTokenizerFast, target: str, evidence: str) -> list[dict]:
    """One row per wording: pairs that break, those refused otherwise, and of the rest those that share a token."""
    config = rp.RaddConfig(vocab_size=len(tokenizer), mask_token_id=tokenizer.mask_token_id, max_length=128)
    model = rp.ProbedModel(rp.RaddForMaskedLM(config), tokenizer, objective="masked")
    options = {"target": target, "evidence": evidence, "model": model, "allow_different_tokens": True}
    rows = []
    for forward, reverse, carrier in ((FORWARD, REVERSE, ""), (FORWARD, REVERSE, CARRIER), (*SPACED, "")):
        wording = {"forward": forward, "reverse": reverse, "carrier": carrier}
        kept = rp.pairs_from_frame(facts, drop=BREAKING[1:], **wording, **options)
        report = kept.report
        broken = report.get("different_tokens", 0)
        refused = {reason: report[f"dropped_{reason}"] for reason in BREAKING if f"dropped_{reason}" in report}
        shared = report.get("shares_tokens", 0)
        rows.append(
            {
                "forward template": carrier + forward,
                "pairs": len(facts),
                "different tokens": f"{broken} ({broken / len(facts):.1%})",
                "refused": refused or "none",
                "share tokens": f"{shared} ({shared / len(kept):.1%})",
                "duplicates": report.get("duplicate_fact", 0),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a CSV file, one fact per row")
    parser.add_argument("--target", default="parent", help="the column asked for")
    parser.add_argument("--evidence", default="child", help="the column given")
    parser.add_argument("--merges", type=int, default=5000)
    arguments = parser.parse_args()
    columns = (arguments.target, arguments.evidence)
    facts = pd.read_csv(arguments.path)
    half = facts.sample(frac=0.5, random_state=0)
    unseen = facts.drop(half.index).reset_index(drop=True)
    rows = []
    for name, seen, counted in (("every row", facts, facts), ("other rows", half, unseen)):
        tokenizer = byte_level_bpe(sentences(seen, *columns), arguments.merges)
        merged = len(tokenizer) - 257
        rows += [{"BPE trained on": f"{name}: {merged} merges", **row} for row in count(counted, tokenizer, *columns)]
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
