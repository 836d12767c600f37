"""Generation: prompts read in chunks, text written token by token, as a stream of typed events."""

from lcore.generation.events import Done, Event, Prefill, Reason, Stats, Token
from lcore.generation.generator import Completion, Generator
from lcore.generation.progress import show_prefill
from lcore.generation.sampling import Sampling

__all__ = [
    "Completion",
    "Done",
    "Event",
    "Generator",
    "Prefill",
    "Reason",
    "Sampling",
    "Stats",
    "Token",
    "show_prefill",
]
