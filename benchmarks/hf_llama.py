"""A small Llama through compressed-tensors: what transformers loads from our folders, logits and bytes.

    python -m benchmarks.hf_llama

The model has Llama's shape and is trained here for a minute, on sums such as "37+58=95;". Nothing is downloaded.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

import detent as dt
from benchmarks import recording
from detent.export import to_compressed_tensors
from detent.grouping import Group

VOCABULARY = "0123456789+=;"
STEPS, BATCH, LENGTH, RATE = 300, 64, 48, 2e-3
MATCH = r"_proj\.weight$"
WAYS: dict[str, dict[str, Any]] = {
    "W8, channel": {"bits": 8, "granularity": "channel"},
    "W4, channel": {"bits": 4, "granularity": "channel"},
    "W4, group of 128": {"bits": 4, "granularity": Group(size=128)},
    "W4, group of 32": {"bits": 4, "granularity": Group(size=32)},
}


def network() -> Any:
    """The model, about 1.6 million weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def text(count: int, generator: torch.Generator) -> Tensor:
    """Lines of sums, as indices into the vocabulary, shape (count, LENGTH)."""
    rows = []
    for _ in range(count):
        line = ""
        while len(line) < LENGTH:
            a, b = (int(n) for n in torch.randint(0, 100, (2,), generator=generator))
            line += f"{a}+{b}={a + b};"
        rows.append([VOCABULARY.index(c) for c in line[:LENGTH]])
    return torch.tensor(rows)


def train(model: Any, recipe: dt.Recipe | None, steps: int, seed: int, rate: float = RATE) -> dt.Run | None:
    """AdamW with a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = None if recipe is None else dt.attach(model, optimizer, recipe, total_steps=steps)
    model.train()
    for _ in range(steps):
        ids = text(BATCH, generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return run


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> tuple[Tensor, float]:
    """(logits, loss in nats a token)."""
    found = model.eval()(ids, labels=ids)
    return found.logits, float(found.loss)


def one(model: Any, run: dt.Run, ids: Tensor, folder: Path, **life: Any) -> dict[str, Any]:
    """Write a life, load it with transformers, and compare."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    report = to_compressed_tensors(run, folder, **life)
    seconds = time.perf_counter() - start
    with run.compressed(**life):
        ours, loss = logits(model, ids)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    theirs, their_loss = logits(loaded, ids)
    same = all(torch.equal(loaded.get_parameter(n), e.decode()) for n, e in run.encoded(**life).items())
    return {
        "logits_bitwise": torch.equal(ours, theirs),
        "largest_difference": float((ours - theirs).abs().max()),
        "weights_bitwise": same,
        "loss": [loss, their_loss],
        "bytes": report.bytes,
        "packed_bytes": report.packed_bytes,
        "packed_weights": sum(e.form.layout.numel for e in run.encoded(**life).values()),
        "ignored": list(report.ignored),
        "detent_bytes": dt.save(run, folder / "model.detent", "compressed", **life),
        "seconds_to_write": seconds,
    }


def main(
    steps: Annotated[int, typer.Option(min=1)] = STEPS,
    out: Annotated[Path | None, typer.Option(help="another record file")] = None,
) -> None:
    """Trains, writes, loads, compares, and writes the record."""
    import compressed_tensors
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with recording(
        "hf_llama",
        question="Does transformers, loading our compressed-tensors folder, give the logits of our compressed life?",
        seeds=[0],
        config={
            "model": "Llama, 8 layers of 128, 4 heads, 2 of them for keys",
            "data": "sums of numbers below 100, generated",
            "steps": steps,
            "batch_size": BATCH,
            "length": LENGTH,
            "rate": RATE,
            "match": MATCH,
            "psg_steps": steps // 2,
            "psg_rate": RATE / 4,
            "threads": 1,
            "transformers": transformers.__version__,
            "compressed_tensors": compressed_tensors.__version__,
        },
        notes="Logits over 64 new lines, float32, both models in this process. The rows after the first training are "
        "post-training (dt.compress); the last one goes on training with PSG towards 4 bits in groups of 32. Loss in "
        "nats a character, our model's and the loaded one's. Bytes: all weights files of the folder; embedding, head "
        "and norms in float32 are among them.",
        out=out,
    ) as results:
        ids = text(64, torch.Generator().manual_seed(12345))
        model = network()
        train(model, None, steps, seed=0)
        results["parameters"] = sum(p.numel() for p in model.parameters())
        results["full_loss"] = logits(model, ids)[1]
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file(model.state_dict(), folder / "full.safetensors")
            results["full_bytes"] = (folder / "full.safetensors").stat().st_size
            for way, grid in WAYS.items():
                run = dt.compress(model, dt.Recipe([dt.Rule(match=MATCH, target=dt.Uniform(**grid))]))
                rows.append({"way": way, **one(model, run, ids, folder / way)})
                print(rows[-1])
            target = dt.Uniform(**WAYS["W4, group of 32"])
            rule = dt.Rule(match=MATCH, target=target, mechanism=dt.PSG(gain=8.0))
            trained = train(model, dt.Recipe([rule]), steps // 2, seed=1, rate=RATE / 4)
            assert trained is not None
            results["full_loss_after_psg"] = logits(model, ids)[1]
            rows.append({"way": "W4, group of 32, PSG", **one(model, trained, ids, folder / "psg")})
            print(rows[-1])
        results["rows"] = rows


if __name__ == "__main__":
    typer.run(main)
