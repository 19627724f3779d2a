"""Greedy and beam search of this library against ``generate`` of transformers on the same model.

``python -m tests.benchmarks generate [--kinds bart t5] [--beams 1 5] [--batch 16] [--json]``

Random weights do not end an answer early, so that all answers have the maximum length. ``--end P`` raises
the end token's logit, so that answers end early, each at its own length. Tokens are compared in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from tests.benchmarks.contenders import make_batches, our_model
from tests.benchmarks.options import model_parser
from tests.benchmarks.pairs import has_fast_bf16, interleaved, timing_table
from vlpet_lightning.batch import Batch
from vlpet_lightning.model import VLModel

STOCK, OURS = "transformers", "ours"


@torch.no_grad()
def stock_generate(model: VLModel, batch: Batch, beams: int, length: int, **changes: Any) -> Tensor:
    """Generate with the language model's own ``generate``, from this library's encoder states."""
    config = model.backbone.generation(model.lm.config, beams, length)
    for name, value in changes.items():
        setattr(config, name, value)
    states = BaseModelOutput(last_hidden_state=model.encode(batch))  # type: ignore[arg-type]
    return model.lm.generate(encoder_outputs=states, attention_mask=model.mask(batch), generation_config=config)


def end_early(model: VLModel, raised: float) -> None:
    """Add a constant to the end token's logit, by a hook on the vocabulary projection's input."""
    head, end = model.lm.lm_head, model.lm.config.eos_token_id
    direction = head.weight[end] / head.weight[end].norm() ** 2

    def shift(_: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + raised * direction
        return output

    model.backbone.stack(model.lm, "decoder").register_forward_hook(shift)


def parser() -> argparse.ArgumentParser:
    found = model_parser("generate", __doc__, methods=["VL-PET-large"])
    found.add_argument("--beams", nargs="+", type=int, default=[1, 5])
    found.add_argument("--length", type=int, default=20, help="maximum number of tokens")
    found.add_argument("--end", type=float, default=0.0, metavar="X", help="raise the end token's logit by X")
    found.add_argument("--rounds", type=int, default=3)
    return found


def main(words: Sequence[str] | None = None) -> None:
    options = parser().parse_args(words)
    torch.set_num_threads(options.threads)
    console = Console(stderr=options.json)
    results = []
    for kind in options.kinds:
        for method in options.methods:
            model = our_model(kind, method, tiny=options.tiny).to(options.device).eval()
            if options.end:
                end_early(model, options.end)
            batch = make_batches(kind, [options.batch], device=options.device)[0]
            for beams in options.beams:
                stock = partial(stock_generate, model, batch, beams, options.length)
                ours = partial(model.generate, batch, num_beams=beams, max_length=options.length)
                found = ours()
                equal = bool(torch.equal(stock(), found))
                ends = found[:, 1:] == model.lm.config.eos_token_id
                lengths = torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 2, found.shape[1]).float()
                works: dict[str, Callable[[], Any]] = {STOCK: stock, OURS: ours}
                if has_fast_bf16(options.device):
                    works[f"{OURS}, bf16"] = partial(_in_bf16, ours, options.device)
                timings = interleaved(
                    works, samples=options.batch, rounds=options.rounds, device=options.device, console=console
                )
                title = f"{kind}, {method}, {beams} beams, {lengths.mean():.1f} tokens on average"
                result = {"kind": kind, "method": method, "beams": beams, "mean_length": lengths.mean().item()}
                results.append(result | {"tokens_equal": equal, "times": [t.as_dict() for t in timings]})
                if not options.json:
                    console.print(timing_table(title, timings))
                if not equal:
                    console.print(f"tokens differ: {title}", style="bold red")
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")


def _in_bf16(work: Callable[[], Any], device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        work()


if __name__ == "__main__":
    main()
