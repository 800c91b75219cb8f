"""The parameters of synthetic chat traffic, and the values that imitate the published conversation trace."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class LogNormal:
    """exp(N(ln median, sigma)), in the unit of `median`."""

    median: float
    sigma: float

    def draw(self, rng: np.random.Generator, size: int) -> NDArray[np.float64]:
        """`size` independent draws."""
        return np.exp(rng.normal(np.log(self.median), self.sigma, size))


@dataclass(frozen=True, slots=True)
class Opening:
    """One way to open a session: its share of the sessions, the tokens after the system prompt, how likely users stay."""

    share: float
    text: LogNormal
    stay: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Chat traffic as sessions; tokens, seconds and shares. Every default was fitted to the conversation trace."""

    num_requests: int = 12_031
    requests_per_s: float = 3.3986  # 12,031 in 1,180 ticks of 3 s
    tick_s: float = 3.0  # arrivals are stamped in steps of this
    warmup_s: float = 2400.0  # sessions begin this long before time 0

    system_tokens: int = 890  # a prompt without a word of the user's
    max_input_tokens: int = 126_195
    openings: tuple[Opening, ...] = (
        Opening(share=0.116, text=LogNormal(9.0, 0.8), stay=0.02),  # a bare question, asked once
        Opening(share=0.215, text=LogNormal(336.0, 1.09), stay=0.38),  # a chat
        Opening(share=0.657, text=LogNormal(7890.0, 0.93), stay=0.287),  # a document, or search results
        Opening(share=0.012, text=LogNormal(82_600.0, 0.24), stay=0.287),  # a book
    )
    stay_weight: float = 3.35  # chances to stay are Beta distributed with this a + b: users differ
    think_s: LogNormal = LogNormal(126.0, 1.04)  # from one turn's arrival to the next, after 8,000 tokens
    think_power: float = 0.12  # longer prompts take longer to think about: (tokens / 8,000) ** this

    remark: LogNormal = LogNormal(16.0, 0.9)  # what a turn adds after the answer before it ...
    paste: LogNormal = LogNormal(1430.0, 1.68)  # ... or a text pasted in
    paste_share: float = 0.327
    edit_share: float = 0.24  # of the turns after a prompt of edit_min_tokens
    edit_min_tokens: int = 8000
    edit_kept_power: float = 2.4  # an edit keeps uniform ** this of the blocks
    edit_growth: LogNormal = LogNormal(1.0, 0.3)  # length after / before an edit

    answer_mean: float = 390.0
    answer_sd: float = 156.0
    curt: LogNormal = LogNormal(25.0, 0.92)
    curt_share: float = 0.19
    long_answer: LogNormal = LogNormal(950.0, 0.4)
    long_answer_share: float = 0.028
    max_output_tokens: int = 2000

    surge_share: float = 0.0056  # of the sessions start in surges, ...
    surge_sessions: int = 14  # ... this many in the same moment


CONVERSATION = Traffic()
