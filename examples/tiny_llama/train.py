"""Train a small, real Llama on the sources of Python's standard library.

    python examples/tiny_llama/train.py --minutes 29

writes next to this file, in this order:

    heldout.txt      whole files the model never saw, for measuring
    calibration.txt  an excerpt of the training files, for observing activations
    model/           a transformers LlamaForCausalLM folder with its tokenizer
    loss.csv         step, tokens, minutes, train loss, held-out bits per byte
    loss.png         the same as a picture (only if matplotlib is installed)

The run is budgeted in minutes of wall clock, not in steps: the learning rate follows the share
of the budget that is spent. A killed run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

HERE = Path(__file__).resolve().parent
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
WINDOW = 256
SKIPPED_FOLDERS = {
    "site-packages", "test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo",
    "pydoc_data", "encodings", "msilib", "ensurepip", "__pycache__",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELDOUT_BYTES = (300_000, 360_000)
CALIBRATION_BYTES = 80_000
CALIBRATION_EXCERPT = 4_000


# ---------------------------------------------------------------------------------- corpus


def library_files(root: Path) -> dict[str, str]:
    """Relative path -> text of every source file worth reading below `root`."""
    files = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = SKIPPED_FOLDERS.intersection(relative.parts)
        if skipped or any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            files[relative.as_posix()] = text
    return files


def titled(name: str, text: str) -> str:
    """The file as it stands in the corpus: a comment naming it, then its text."""
    return f"# ==== Lib/{name} ====\n{text.rstrip()}\n\n"


def path_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def split(files: dict[str, str]) -> tuple[list[str], list[str]]:
    """Whole files in the order of their path's hash: the first 300-360 kB are held out."""
    least, most = HELDOUT_BYTES
    training: list[str] = []
    heldout: list[str] = []
    size = 0
    for name in sorted(files, key=path_hash):
        text = titled(name, files[name])
        length = len(text.encode())
        if size < least and size + length <= most:
            heldout.append(text)
            size += length
        else:
            training.append(text)
    return training, heldout


def calibration_text(training: list[str]) -> str:
    """The first lines of evenly spaced training files, about `CALIBRATION_BYTES` in all."""
    count = CALIBRATION_BYTES // CALIBRATION_EXCERPT
    long_enough = [text for text in training if len(text) > 2 * CALIBRATION_EXCERPT]
    spacing = len(long_enough) / count
    chosen = [long_enough[int(index * spacing)] for index in range(count)]
    return "".join(text[:CALIBRATION_EXCERPT].rpartition("\n")[0] + "\n\n" for text in chosen)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte has an entry, so no text is out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token numbers, each text after an end-of-text token."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.bos_token_id)
        stream.extend(tokenizer.encode(text, verbose=False))
    return torch.tensor(stream)


# ------------------------------------------------------------------------ model and measure


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 2.9 million parameters: 11.5 MB in float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size); 0.02 learns far slower at this size
    )
    return LlamaForCausalLM(config).float()


def next_token_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Mean of -ln p(next token), in nats, over all but the first token of each window."""
    logits = model(windows, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """`next_token_loss` over many windows, a few at a time."""
    model.eval()
    losses = [next_token_loss(model, part) * len(part) for part in windows.split(8)]
    model.train()
    return float(sum(losses)) / len(windows)


def cut(stream: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """The stream as rows of `WINDOW` tokens that do not overlap."""
    rows = (len(stream) - offset) // WINDOW
    return stream[offset : offset + rows * WINDOW].view(rows, WINDOW)


@dataclass(frozen=True)
class HeldOut:
    """Text to measure on: all its windows, a spread-out few of them, and its token length."""

    windows: torch.Tensor
    slice: torch.Tensor
    bytes_per_token: float

    def bits_per_byte(self, loss: float) -> float:
        """Nats per token -> bits per byte."""
        return loss / math.log(2) / self.bytes_per_token


def measured(tokenizer: PreTrainedTokenizerFast, text: str, slice_windows: int) -> HeldOut:
    tokens = torch.tensor(tokenizer.encode(text, verbose=False))
    windows = cut(tokens)
    spacing = max(len(windows) // slice_windows, 1)
    return HeldOut(windows, windows[::spacing], len(text.encode()) / len(tokens))


def batches(stream: torch.Tensor, size: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """Batches number `start`, `start` + 1, ... of an endless sequence fixed by `seed`.

    Each epoch cuts the stream at another offset and visits every window once, in random order.
    """
    per_epoch = (len(stream) // WINDOW - 1) // size
    for epoch in range(start // per_epoch, 1 << 30):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        offset = int(torch.randint(WINDOW, (), generator=generator))
        windows = cut(stream, offset)
        order = torch.randperm(len(windows), generator=generator)
        first = max(start - epoch * per_epoch, 0)
        for index in range(first, per_epoch):
            yield windows[order[index * size : (index + 1) * size]]


def learning_rate(share: float, peak: float, warmup: float) -> float:
    """Linear rise over the first `warmup` share of the budget, then a cosine down to 1 %."""
    if share < warmup:
        return peak * share / warmup
    fallen = min((share - warmup) / (1 - warmup), 1.0)
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * fallen)) / 2)


# --------------------------------------------------------------------------------- the run


@dataclass
class Point:
    """One row of loss.csv."""

    step: int
    tokens: int
    minutes: float
    train_loss: float
    heldout_bits_per_byte: float


@dataclass
class Progress:
    """How far a run has come; `seconds` counts training over all its restarts."""

    step: int = 0
    seconds: float = 0.0
    points: list[Point] = field(default_factory=list)


def optimizer_for(model: LlamaForCausalLM, peak: float, decay: float) -> torch.optim.AdamW:
    """AdamW; matrices decay, norm gains do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: Progress
) -> None:
    """Written beside the old one and then renamed, so that a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"progress": asdict(progress)}, unfinished)
    os.replace(unfinished, path)


def load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    saved = state["progress"]
    points = [Point(**point) for point in saved["points"]]
    return Progress(saved["step"], saved["seconds"], points)


def publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for file in Path(unfinished).iterdir():
            os.replace(file, folder / file.name)


def write_losses(points: list[Point], folder: Path) -> None:
    with open(folder / "loss.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "tokens", "minutes", "train_loss", "heldout_bits_per_byte"])
        for point in points:
            figures = [f"{point.train_loss:.4f}", f"{point.heldout_bits_per_byte:.4f}"]
            writer.writerow([point.step, point.tokens, f"{point.minutes:.2f}", *figures])


def plot_losses(points: list[Point], folder: Path) -> None:
    """Draw loss.png; without matplotlib there is simply no picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: matplotlib is not installed")
        return
    minutes = [point.minutes for point in points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    left.plot(minutes, [point.train_loss for point in points], "C0")
    right.plot(minutes, [point.heldout_bits_per_byte for point in points], "C1")
    left.set_xlabel("minutes of training")
    left.set_ylabel("training loss, nats per token", color="C0")
    right.set_ylabel("held-out bits per byte", color="C1")
    left.grid(alpha=0.3)
    figure.savefig(folder / "loss.png", dpi=110)


def report(point: Point, rate: float, speed: float, seconds_left: float) -> None:
    minutes, seconds = divmod(max(int(seconds_left), 0), 60)
    print(
        f"step {point.step:6d}  {point.minutes:5.1f} min  train {point.train_loss:.4f}  "
        f"held-out {point.heldout_bits_per_byte:.4f} bits/byte  rate {rate:.1e}  "
        f"{speed:5.0f} tokens/s  {minutes:d}:{seconds:02d} left",
        flush=True,
    )


def write_corpus(folder: Path) -> tuple[list[str], list[str]]:
    """Write heldout.txt and calibration.txt; return the training and the held-out texts."""
    training, heldout = split(library_files(Path(sysconfig.get_paths()["stdlib"])))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.txt").write_text("".join(heldout), encoding="utf-8")
    (folder / "calibration.txt").write_text(calibration_text(training), encoding="utf-8")
    return training, heldout


def step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.AdamW,
    batch: torch.Tensor,
    rate: float,
    bfloat16: bool,
) -> float:
    """One update of the weights; returns the batch's loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        loss = next_token_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stream: torch.Tensor,
    heldout: HeldOut,
    options: argparse.Namespace,
) -> list[Point]:
    """Train until the budget is spent, saving checkpoints and the model on the way."""
    optimizer = optimizer_for(model, options.rate, options.decay)
    checkpoint = options.checkpoints / "checkpoint.pt"
    progress = Progress()
    if checkpoint.exists() and not options.restart:
        progress = load_checkpoint(checkpoint, model, optimizer)
        print(f"continuing at step {progress.step}, {progress.seconds / 60:.1f} minutes")

    budget = options.minutes * 60
    began = time.monotonic() - progress.seconds
    logged_at = saved_at = published_at = progress.seconds
    losses: list[float] = []
    for batch in batches(stream, options.batch, options.seed, progress.step):
        progress.seconds = time.monotonic() - began
        if progress.seconds >= budget:
            break
        rate = learning_rate(progress.seconds / budget, options.rate, options.warmup)
        losses.append(step(model, optimizer, batch, rate, options.bfloat16))
        progress.step += 1

        progress.seconds = time.monotonic() - began
        if progress.seconds - logged_at >= options.log_seconds:
            speed = len(losses) * batch.numel() / (progress.seconds - logged_at)
            point = Point(
                step=progress.step,
                tokens=progress.step * batch.numel(),
                minutes=progress.seconds / 60,
                train_loss=sum(losses) / len(losses),
                heldout_bits_per_byte=heldout.bits_per_byte(mean_loss(model, heldout.slice)),
            )
            progress.points.append(point)
            report(point, rate, speed, budget - progress.seconds)
            losses.clear()
            progress.seconds = logged_at = time.monotonic() - began
        if progress.seconds - saved_at >= options.checkpoint_seconds:
            save_checkpoint(checkpoint, model, optimizer, progress)
            saved_at = progress.seconds
        if progress.seconds - published_at >= options.publish_minutes * 60:
            publish(model, tokenizer, options.output / "model")
            published_at = progress.seconds

    publish(model, tokenizer, options.output / "model")
    checkpoint.unlink(missing_ok=True)
    return progress.points


def run(options: argparse.Namespace) -> None:
    """Write the corpus and the tokenizer, train, write the loss curve, measure the result."""
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    training, heldout_texts = write_corpus(options.output)
    tokenizer = train_tokenizer(training)
    tokenizer.save_pretrained(options.output / "model")
    stream = encode(tokenizer, training)
    heldout = measured(tokenizer, "".join(heldout_texts), options.slice)
    print(
        f"{len(training)} training files, {len(stream)} tokens; "
        f"{len(heldout_texts)} held-out files, {len(heldout.windows)} windows of {WINDOW} tokens",
        flush=True,
    )

    model = new_model(tokenizer)
    points = train(model, tokenizer, stream, heldout, options)
    write_losses(points, options.output)
    plot_losses(points, options.output)
    loss = mean_loss(model, heldout.windows)
    print(
        f"all of heldout.txt: {heldout.bits_per_byte(loss):.4f} bits/byte, "
        f"perplexity {math.exp(loss):.4f} per token in windows of {WINDOW}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    scratch = Path(tempfile.gettempdir()) / "tiny_llama_ckpt"
    parser.add_argument("--minutes", type=float, default=29.0, help="training time (29)")
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--checkpoints", type=Path, default=scratch, help="folder to resume from")
    parser.add_argument("--restart", action="store_true", help="ignore an earlier checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4, help="windows of 256 tokens a step (4)")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (2e-3)")
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the budget (0.03)")
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay (0.1)")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="multiply in bfloat16 while training; weights and measurements are float32 anyway",
    )
    parser.add_argument("--slice", type=int, default=24, help="held-out windows per log line (24)")
    parser.add_argument("--log-seconds", type=float, default=30.0)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--publish-minutes", type=float, default=8.0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
