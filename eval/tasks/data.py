"""Read the tasks' questions from the files beside this one, whatever the working directory is."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict


def load(*, file: str, **_: Any) -> DatasetDict:
    """Return a file's rows as the test split; lm-eval passes the task's metadata too, which is of no use here."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return DatasetDict({"test": Dataset.from_list([json.loads(line) for line in lines])})


def score_text(row: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Return the log-likelihood of a text with the bytes it is divided by."""
    (loglikelihood,) = results
    size = len(row["text"].encode())
    return {"byte_perplexity": (loglikelihood, size), "bits_per_byte": (loglikelihood, size)}
