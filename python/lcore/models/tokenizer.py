"""Text to token ids and back, with the tokenizer and chat template of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from lcore.errors import message, require
from lcore.models.chat_template import render
from lcore.models.checkpoint import read_json

_TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (_TOKENIZER, _SETTINGS, _TEMPLATE)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OWNER = "Tokenizer.apply_chat_template"
# Arguments of transformers' method of this name that ask for something else than the text.
_UNSUPPORTED = ("tokenize", "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask")


class Tokenizer:
    """A `tokenizers.Tokenizer` with the special tokens, end ids and chat template of its folder.

    Args:
        backend: from tokenizer.json. Truncation and padding that it may carry are switched off: long texts are
            what this package is for.
        settings: tokenizer_config.json.
        chat_template: Jinja source, or several by name, of which "default" is used; None for a model without one.
        eos_token_ids: ids that end a text; the settings' eos_token is added.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.settings = dict(settings or {})
        self.chat_template = chat_template
        self.special_tokens = {name: _text(self.settings[name]) for name in _SPECIAL if self.settings.get(name)}
        ids = list(eos_token_ids)
        own = self.backend.token_to_id(self.special_tokens.get("eos_token", ""))
        if own is not None and own not in ids:
            ids.append(own)
        self.eos_token_ids = tuple(ids)

    @classmethod
    def from_folder(cls, folder: Path, eos_token_ids: Iterable[int] = ()) -> Tokenizer | None:
        """Reads tokenizer.json, tokenizer_config.json and the chat template; None without tokenizer.json."""
        if not (folder / _TOKENIZER).is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / _TOKENIZER))
        except Exception as error:  # the Rust library raises nothing narrower
            rule = "be a file of the tokenizers library"
            raise ValueError(message("load_model", _TOKENIZER, rule, f"{folder / _TOKENIZER}: {error}")) from error
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", _SETTINGS):
            if (folder / name).is_file():
                settings |= read_json(folder / name)
        return cls(backend, settings, _find_template(folder, settings), eos_token_ids)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; add_special_tokens lets tokenizer.json put its own before and after (mostly bos).

        Text from a chat template holds its special tokens already: encode it with add_special_tokens=False.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Writes a conversation as the text that the model was trained on.

        Args:
            messages: {"role": ..., "content": ...} dicts of JSON values.
            tools: JSON schemas of functions that the model may call.
            documents: {"title": ..., "text": ...} dicts.
            chat_template: Jinja source, or the name of one of several; default the checkpoint's own.
            add_generation_prompt: end with the words that start the assistant's turn.
            variables: anything else that the template reads, such as enable_thinking.
        Returns: the text; encode it with add_special_tokens=False.
        Raises: ValueError without a template, or when the template stops, with its message.
        """
        for name in _UNSUPPORTED:
            if variables.get(name):
                raise NotImplementedError(message(_OWNER, name, "be left out: the text is returned", variables[name]))
        source = self._choose_template(chat_template, bool(tools))
        given = {"messages": messages, "tools": tools, "documents": documents}
        return render(
            source, self.special_tokens | given | {"add_generation_prompt": add_generation_prompt} | variables
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, the chat template within."""
        self.backend.save(str(folder / _TOKENIZER))
        settings = {name: value for name, value in self.settings.items() if name != "chat_template"}
        if isinstance(self.chat_template, str):
            (folder / _TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        elif self.chat_template:
            named = self.chat_template.items()
            settings["chat_template"] = [{"name": name, "template": text} for name, text in named]
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _choose_template(self, asked: str | None, with_tools: bool) -> str:
        own = self.chat_template
        if isinstance(own, Mapping):
            if asked is None:
                asked = "tool_use" if with_tools and "tool_use" in own else "default"
                require(asked in own, _OWNER, "chat_template", f"be one of {', '.join(own)}", "none")
            return own.get(asked, asked)
        chosen = asked if asked is not None else own
        if chosen is None:
            raise ValueError(message(_OWNER, "chat_template", "be given: the checkpoint has none", None))
        return chosen


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """chat_template.jinja and additional_chat_templates/, else the entry of tokenizer_config.json."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / _TEMPLATE).is_file():
        files["default"] = folder / _TEMPLATE
    texts = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if texts:
        return texts["default"] if list(texts) == ["default"] else texts
    inside = settings.get("chat_template")
    if isinstance(inside, list):
        return {entry["name"]: entry["template"] for entry in inside}
    return inside


def _text(token: str | Mapping[str, Any]) -> str:
    """A special token is a string, or a dict that also says how to strip around it."""
    return token if isinstance(token, str) else str(token["content"])
