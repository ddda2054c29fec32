"""Train the bundled tiny Llama on the source of Python's standard library, on one CPU core.

    python examples/train_tiny_llama.py

Everything comes from the running Python: a byte-level BPE tokenizer and a grouped-query LlamaForCausalLM are trained on
the library's own files, and every 20th file is held out. The folder that is written loads with AutoTokenizer and
AutoModelForCausalLM. The held-out files are measured only once training has ended, so they choose neither the
checkpoint nor when to stop.
"""

import argparse
import copy
import gzip
import json
import math
import platform
import shlex
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT = Path(__file__).resolve().parent / "tiny-llama"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
VOCAB_SIZE = 4096
CONTEXT = 1024

# Not library source: installed packages, tests, bundled programs, and what a build generates. The character tables in
# encodings/ are near copies of each other, so a table held out would already be known from the others.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "turtledemo", "encodings"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELDOUT_EVERY = 20
HELDOUT_RULE = f"every {HELDOUT_EVERY}th file by sorted path, from the {HELDOUT_EVERY}th on"

# One token may hold a line break with the indentation after it, or a word with the blank before it; digits stand alone.
SPLIT_PATTERN = r"\r?\n[ \t]*|[ ]?[\p{L}_]+|\p{N}|[ ]?[^\s\p{L}\p{N}_]+|\s+"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Return the checked options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: examples/tiny-llama)")
    parser.add_argument("--steps", type=int, default=1700, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="tokens per step (default: %(default)s)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens per row, mostly (default: %(default)s)")
    parser.add_argument(
        "--long-every", type=int, default=5, help="one step in so many has long rows (default: %(default)s)"
    )
    parser.add_argument("--learning-rate", type=float, default=2.5e-3, help="peak, after warmup (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: %(default)s)")
    parser.add_argument("--intermediate-size", type=int, default=512, help="MLP width (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--evaluate-only", action="store_true", help="measure the folder's weights again")
    arguments = parser.parse_args(argv)
    for name in ("steps", "long_every", "layers", "intermediate_size", "threads", "save_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 2 <= arguments.sequence <= CONTEXT:
        parser.error(f"--sequence must be between 2 and {CONTEXT}")
    if arguments.batch_tokens < 1 or any(arguments.batch_tokens % length for length in (CONTEXT, arguments.sequence)):
        parser.error(f"--batch-tokens must be a multiple of {CONTEXT} and of --sequence")
    return arguments


def read_library() -> dict[str, str]:
    """Return the standard library's sources, {path inside the library: text}, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not relative.parts[0].startswith(SKIPPED_PREFIXES):
            texts[relative.as_posix()] = path.read_bytes().decode("utf-8")
    if len(texts) < 2 * HELDOUT_EVERY:
        raise SystemExit(
            f"Found {len(texts)} standard-library source files below {root}; this Python seems to be "
            "installed without its *.py files, so there is nothing to train on."
        )
    return dict(sorted(texts.items()))


def split_library(texts: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (training, held-out) files; HELDOUT_RULE says which are held out."""
    heldout = list(texts)[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    training = {path: text for path, text in texts.items() if path not in heldout}
    return training, {path: texts[path] for path in heldout}


def choose_extract(heldout: dict[str, str], max_bytes: int = 90_000) -> list[str]:
    """Return the held-out files, of 2 to 30 KB each, whose texts in this order make heldout.txt."""
    chosen, total = [], 0
    for path, text in heldout.items():
        size = len(text.encode())
        if 2_000 <= size <= 30_000 and total + size <= max_bytes:
            chosen.append(path)
            total += size
    return chosen


def read_licence() -> str:
    """Return the licence text of the running Python."""
    folders = [sysconfig.get_paths()["stdlib"], sys.base_prefix]
    for path in (Path(folder) / name for folder in folders for name in ("LICENSE.txt", "LICENSE")):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise SystemExit(f"Found no LICENSE.txt in {' or '.join(folders)}; heldout.txt needs Python's licence beside it.")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text comes back unchanged, and encoding puts a bos in front."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the text's tokens without special tokens, however long the text is."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama: 8 query heads over 2 KV heads of 32 dimensions, tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    stream: torch.Tensor, length: int, batch_tokens: int, bos: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield [batch_tokens // length, length] batches for ever. A row is a bos and length - 1 tokens of the stream.

    Each pass visits the rows in a new order and cuts the stream at another offset.
    """
    count, size = batch_tokens // length, length - 1
    while True:
        offset = int(torch.randint(size, (), generator=generator))
        rows = stream[offset : offset + (len(stream) - offset) // size * size].view(-1, size)
        for chosen in torch.randperm(len(rows), generator=generator).split(count):
            if len(chosen) == count:
                yield F.pad(rows[chosen], (1, 0), value=bos)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: linear warmup over at most 100 steps, then half a cosine down to 0."""
    warmup = min(100, math.ceil(steps / 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, arguments: argparse.Namespace, save: Callable[[int], None]
) -> None:
    """Train in place with AdamW. save(steps_done) is called every save_every steps, at the end and on an interrupt."""
    matrices = {"params": [parameter for parameter in model.parameters() if parameter.ndim >= 2], "weight_decay": 0.1}
    vectors = {"params": [parameter for parameter in model.parameters() if parameter.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], betas=(0.9, 0.97), fused=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    bos = model.config.bos_token_id
    short = batches(stream, arguments.sequence, arguments.batch_tokens, bos, generator)
    long = batches(stream, CONTEXT, arguments.batch_tokens, bos, generator)
    average, done = None, 0
    model.train()
    progress = tqdm(range(arguments.steps), desc="training", unit="step", mininterval=5)
    try:
        for step in progress:
            batch = next(short if (step + 1) % arguments.long_every else long)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.set_postfix_str(f"loss {average:.3f}", refresh=False)
            if done % arguments.save_every == 0 and done < arguments.steps:
                save(done)
                tqdm.write(f"saved after {done} steps: training loss {average:.3f}")
    except KeyboardInterrupt:
        tqdm.write(f"stopped after {done} of {arguments.steps} steps; keeping what was learnt")
    save(done)


@torch.inference_mode()
def negative_log2_likelihood(model: LlamaForCausalLM, tokens: list[int], stride: int = CONTEXT // 2) -> float:
    """Return the bits that the model needs for all the tokens of one text.

    Windows of CONTEXT tokens (a bos and real context) move by `stride`; every token is counted once.
    """
    bits, scored = 0.0, 0
    while scored < len(tokens):
        end = min(len(tokens), scored + (stride if scored else CONTEXT - 1))
        window = torch.tensor([[model.config.bos_token_id, *tokens[max(0, end - CONTEXT + 1) : end]]])
        new = end - scored
        logits = model(input_ids=window, use_cache=False, logits_to_keep=new + 1).logits[0, :-1].float()
        bits += F.cross_entropy(logits, window[0, -new:], reduction="sum").item() / math.log(2)
        scored = end
    return bits


def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Return the bits for all tokens of all texts, divided by the texts' UTF-8 bytes."""
    progress = tqdm(texts, desc="evaluating", unit="text", mininterval=5)
    bits = sum(negative_log2_likelihood(model, encode(tokenizer, text)) for text in progress)
    return bits / sum(len(text.encode()) for text in texts)


def write_record(folder: Path, record: dict) -> None:
    """Write training.json."""
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def train_and_save(arguments: argparse.Namespace, training: dict[str, str], heldout: dict[str, str]) -> None:
    """Train tokenizer and model, and write the folder but for the measurements."""
    started = time.monotonic()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    extract = choose_extract(heldout)
    (folder / "heldout.txt").write_bytes("".join(heldout[path] for path in extract).encode())
    (folder / "LICENSE-PSF.txt").write_text(read_licence(), encoding="utf-8")

    tokenizer = train_tokenizer(list(training.values()))
    tokenizer.save_pretrained(folder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    stream = torch.cat([torch.tensor([bos, *encode(tokenizer, text), eos]) for text in training.values()])
    training_bytes = sum(len(text.encode()) for text in training.values())
    torch.manual_seed(arguments.seed)
    model = build_model(arguments, tokenizer)
    tqdm.write(
        f"{model.num_parameters():,} parameters; {len(training)} files of {training_bytes:,} bytes in all, "
        f"{len(stream):,} tokens"
    )

    settings = {name: value for name, value in vars(arguments).items() if name not in ("output", "evaluate_only")}
    device = f"cpu, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {arguments.threads} thread(s)"

    def save(steps_done: int) -> None:
        copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
        record = {
            "bits_per_byte": None,
            "heldout": {"rule": HELDOUT_RULE, "files": list(heldout)},
            "heldout_txt_files": extract,
            "training": {"files": len(training), "bytes": training_bytes, "tokens": len(stream)},
            "parameters": model.num_parameters(),
            "weights_dtype": "bfloat16",
            "steps": steps_done,
            "tokens_trained": steps_done * arguments.batch_tokens,
            "seconds": round(time.monotonic() - started),
            "settings": settings,
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": shlex.join(["python", "examples/train_tiny_llama.py", *sys.argv[1:]]),
        }
        write_record(folder, record)

    train(model, stream, arguments, save)


def evaluate_and_record(folder: Path, heldout: dict[str, str]) -> float:
    """Load the saved weights in float32, measure them and complete training.json. Return the bits per byte."""
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"There is no training.json in {folder}; train the model first.") from None
    if record["heldout"]["files"] != list(heldout):
        raise SystemExit(
            f"The model was trained under Python {record['python']}, whose held-out files are not "
            f"those of this Python {platform.python_version()}: some of these would have been trained on."
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    everything = "".join(heldout.values()).encode()
    extract = (folder / "heldout.txt").read_bytes().decode()
    record["bits_per_byte"] = round(bits_per_byte(model, tokenizer, list(heldout.values())), 4)
    record["heldout"]["bytes"] = len(everything)
    record["heldout"]["gzip_9_bits_per_byte"] = round(8 * len(gzip.compress(everything, 9)) / len(everything), 4)
    record["heldout_txt_bits_per_byte"] = round(bits_per_byte(model, tokenizer, [extract]), 4)
    write_record(folder, record)
    return record["bits_per_byte"]


def main(argv: list[str]) -> None:
    """Train, unless only an evaluation is asked for, and measure what was saved."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite stop keeps the weights, as Ctrl-C does
    training, heldout = split_library(read_library())
    if not arguments.evaluate_only:
        train_and_save(arguments, training, heldout)
    measured = evaluate_and_record(arguments.output, heldout)
    tqdm.write(f"{measured:.4f} bits per byte on {len(heldout)} held-out files")


if __name__ == "__main__":
    main(sys.argv[1:])
