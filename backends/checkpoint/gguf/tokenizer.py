"""The tokenizer in a GGUF header, where llama.cpp has one that splits text the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {LETTERS + r"\p{N}{1,3}" + REST: "llama-bpe", LETTERS + r"\p{N}" + REST: "qwen2"}
"""Regular expression that a tokenizer splits by → what llama.cpp calls it."""


def write_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> str | None:
    """Write the tokenizer in `folder` for a table of `size` words. Returns why it is left out."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return f"no tokenizer: {folder} has no tokenizer.json; llama.cpp needs one to read text"
    raw = json.loads(file.read_text())
    model, split = raw["model"], _split(raw.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or split is None:
        return (
            f"no tokenizer: only byte-level BPE that splits as GPT-2, Llama 3 or Qwen2 do is "
            f"written; {file.name} is another {model.get('type')}"
        )
    if raw.get("normalizer") not in (None, {"type": "NFC"}):
        return f"no tokenizer: {file.name} normalizes text, of which llama.cpp knows nothing"
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, TokenType.NORMAL
    for token in raw.get("added_tokens", ()):
        i = token["id"]
        tokens[i] = token["content"]
        types[i] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    _special(writer, folder, {t: i for i, t in enumerate(tokens)})
    return None


def _split(pre: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for how text is split before it is merged."""
    if pre is None:
        return None
    if pre["type"] == "ByteLevel" and pre.get("use_regex") and not pre.get("add_prefix_space"):
        return "gpt-2"
    parts = pre.get("pretokenizers", [])
    if [p["type"] for p in parts] != ["Split", "ByteLevel"] or parts[1].get("use_regex"):
        return None
    return SPLITS.get(parts[0]["pattern"].get("Regex", ""))


def _special(writer: GGUFWriter, folder: Path, ids: dict[str, int]) -> None:
    """Which tokens begin, end and pad a text, and the template of a conversation."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    for key, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("unk_token", writer.add_unk_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        text = config.get(key)
        text = text.get("content") if isinstance(text, dict) else text
        if text in ids:
            add(ids[text])
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else config.get("chat_template")
    if isinstance(text, str):
        writer.add_chat_template(text)
