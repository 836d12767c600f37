"""Generation: prompts read in chunks, text written token by token, as a stream of typed events."""

from lcore.generation.events import Completion, Done, Event, Prefill, Reason, Stats, Token
from lcore.generation.generator import Generator
from lcore.generation.ngram import Ngram
from lcore.generation.progress import show_prefill
from lcore.generation.sampling import Sampling
from lcore.generation.self_speculation import SelfSpeculation
from lcore.generation.speculation import Drafter, Speculate

__all__ = [
    "Completion",
    "Done",
    "Drafter",
    "Event",
    "Generator",
    "Ngram",
    "Prefill",
    "Reason",
    "Sampling",
    "SelfSpeculation",
    "Speculate",
    "Stats",
    "Token",
    "show_prefill",
]
