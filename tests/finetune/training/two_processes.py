"""What `test_distributed.py` runs in each of two gloo processes: `two_processes.py FOLDER RANK SIZE`.

The group is made over a file, and gloo is kept to the loopback interface, so that nothing listens elsewhere.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainingArguments, set_seed

import revprobe as rp
from revprobe.finetune.training.distributed import ProcessGroup
from revprobe.finetune.training.prediction_callback import FirstOrderPrediction
from revprobe.finetune.training.probe_callback import ProbeCallback, take_readings
from revprobe.finetune.training.trainer import ForwardOnlyTrainer, TokenRows
from revprobe.models.bases.configs import LLaDAConfig
from revprobe.models.families.llada import LLaDAForMaskedDiffusion
from revprobe.models.probed import ProbedModel
from revprobe.relations.catalog import letters

STEPS = (0, 2, 4)


def long_names() -> tuple[ProbedModel, rp.ReversalPairs]:
    """A two-layer model and pairs whose targets have one to three tokens, so that some are priced in chains."""
    torch.manual_seed(0)
    size = {"d_model": 16, "n_heads": 2, "n_layers": 2, "mlp_hidden_size": 24, "vocab_size": 60, "embedding_size": 60}
    module = LLaDAForMaskedDiffusion(LLaDAConfig(**size, mask_token_id=59, pad_token_id=0, eos_token_id=0))
    pairs = []
    for fact in range(13):
        width = 1 + fact % 3
        target, evidence = [1 + fact + 13 * k for k in range(width)], [40 + fact]
        fill = [56] * (1 + fact % 2)
        forward = rp.Query([*target, *fill, *evidence], range(width), [width + len(fill)])
        reverse = rp.Query([*evidence, *fill, *target], range(1 + len(fill), 1 + len(fill) + width), [0])
        pairs.append(rp.ReversalPair(forward, reverse, fact=str(fact)))
    return ProbedModel(module.eval(), objective="masked", name="tiny"), rp.ReversalPairs.from_pairs(pairs)


def letter_model(dtype: torch.dtype = torch.float32) -> ProbedModel:
    set_seed(0)
    tokenizer = rp.letter_tokenizer()
    ids = {"vocab_size": len(tokenizer), "mask_token_id": tokenizer.mask_token_id, "max_length": 4}
    module = rp.RaddForMaskedLM(rp.RaddConfig(**ids, d_model=16, n_heads=2, n_layers=1)).to(dtype)
    return ProbedModel(module, tokenizer, objective="masked", name="letters")


def probed_lists(model: ProbedModel) -> dict[str, rp.ReversalPairs]:
    """The lists of a letters run, cut short."""
    grid = rp.letter_pairs(4, model=model, placements="grid")
    return {"attention": grid, "gradient": grid[:40], "probability": grid[:1]}


def train(folder: Path) -> ForwardOnlyTrainer:
    """A few steps with readings and predictions at every snapshot."""
    model = letter_model()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS[-1],
        per_device_train_batch_size=8,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    rows = TokenRows(torch.tensor(model.tokenizer(letters(4).training_texts())["input_ids"]))
    trainer = ForwardOnlyTrainer(
        model=model.module,
        args=args,
        train_dataset=rows,
        processing_class=model.tokenizer,
        objective="masked",
        ema_decay=0.9,
        snapshots=STEPS,
    )
    pairs = probed_lists(model)
    trainer.add_callback(ProbeCallback(pairs, steps=STEPS, ema=trainer.ema, objective="masked"))
    trainer.add_callback(FirstOrderPrediction(pairs["gradient"], objective="masked"))
    trainer.train()
    return trainer


def failure_of_one(team: ProcessGroup) -> str:
    """What this process is told when the second one fails."""

    def work() -> int:
        if team.rank == 1:
            raise rp.RevprobeError("planted on the second")
        return team.rank

    try:
        team.gather(work)
    except rp.RevprobeError as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int, size: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    seen: dict[str, Any] = {"saved": [], "queries": 0}
    team = ProcessGroup(rank, size)
    model, pairs = long_names()
    counted = lambda name, done, total: seen.update(queries=total)  # noqa: E731
    take_readings(model, pairs, share=team.share, listener=counted).save(folder / f"long-{rank}")
    letters_model = letter_model()
    take_readings(letters_model, probed_lists(letters_model), share=team.share).save(folder / f"letters-{rank}")
    seen["failure"] = failure_of_one(team)
    seen["first"] = team.on_rank_zero(lambda: f"by {rank}")
    seen["alone"] = team.on_rank_zero(lambda: train(folder / "alone").args.world_size)

    save = rp.Readings.save

    def watched(self: rp.Readings, path: Any) -> Path:
        seen["saved"].append(Path(path).name)
        return save(self, path)

    rp.Readings.save = watched  # type: ignore[method-assign]
    trainer = train(folder / "run")
    seen |= {"world": trainer.args.world_size, "batch": trainer.args.train_batch_size}
    seen["sum"] = float(sum(p.detach().double().sum() for p in trainer.model.parameters()))
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
