"""Selections: which pages a query reads while everything is kept. `lcore.selection.Selection` is the interface."""

from lcore.cache.layer_pages import LayerPages
from lcore.cache.selection.base import Selection
from lcore.cache.selection.infllm import InfLLM
from lcore.cache.selection.parse import parse_selection
from lcore.cache.selection.quest import Quest

__all__ = ["InfLLM", "LayerPages", "Quest", "Selection", "parse_selection"]
