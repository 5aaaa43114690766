"""Whether a tenant can tell from cached tokens or from the time to first token what another tenant has asked.

    make channel                               # or: python tests/channel.py --questions 20 --words 400

Ann asks a question, and again: that is what a hit looks like. Then Bob asks Ann's question and one that nobody has
asked, in an order drawn at random. If tenants are apart, Ann's question gives Bob as many cached tokens as it gave Ann
when it was new, and a Mann-Whitney test cannot tell the times of Bob's two kinds of questions from each other.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import openai
from scipy.stats import mannwhitneyu
from serving import command

KEYS = {"ann": "key-of-ann-0123456789", "bob": "key-of-bob-0123456789"}
KINDS = ("ann, new", "ann, again", "bob, ann's", "bob, new")
WORDS = ("pears", "boxes", "seven", "how", "many", "left", "river", "each", "of", "them")
MESH = """version: 1
name: team
model: {model}
topology: {{use: fully-connected, agents: 2}}
agents:
  agent:
    system: You are a member of a team that answers questions shortly, and never guesses.
    prompt: |
      {{{{ question }}}}
      {{% for message in inbox %}}
      {{{{ message }}}}
      {{% endfor %}}
    generate: {{max_tokens: 2}}
communicator: {{preset: prefix, min_tokens: 4}}
"""


@dataclass(frozen=True)
class Asked:
    """One question: cached prompt tokens, and seconds to the first token of the answer."""

    cached: int
    seconds: float


def measure(model: str, questions: int, words: int, seed: int = 0) -> Mapping[str, Sequence[Asked]]:
    """Ask a server of its own; what each kind of question cost, in the same order for all kinds."""
    draw, found = random.Random(seed), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        mesh = Path(folder) / "team.yaml"
        mesh.write_text(MESH.format(model=model))
        environment = {"AGENTMESH_API_KEYS": ",".join(f"{name} {key}" for name, key in KEYS.items())}
        with command(mesh, environment=environment) as (url, _):
            clients = {name: openai.OpenAI(base_url=f"{url}/v1", api_key=key) for name, key in KEYS.items()}

            def question() -> str:
                return " ".join(draw.choice(WORDS) for _ in range(words))

            for client in clients.values():
                ask(client, question())  # so that the fixed text is known to both
            for _ in range(questions):
                anns = question()
                found["ann, new"].append(ask(clients["ann"], anns))
                found["ann, again"].append(ask(clients["ann"], anns))
                bobs = [("bob, ann's", anns), ("bob, new", question())]
                for kind, text in draw.sample(bobs, 2):
                    found[kind].append(ask(clients["bob"], text))
    return found


def ask(client: openai.OpenAI, question: str) -> Asked:
    """Ask one question, streamed."""
    begun, first, cached = time.perf_counter(), 0.0, 0
    messages = [{"role": "user", "content": question}]
    options = {"include_usage": True}
    chunks = client.chat.completions.create(model="team", messages=messages, stream=True, stream_options=options)  # type: ignore[call-overload]
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content and not first:
            first = time.perf_counter() - begun
        if chunk.usage is not None:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
    return Asked(cached, first)


def main() -> int:
    """Measure as the command line says; 1 where tenants are not apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, help="how many (20)")
    parser.add_argument("--words", type=int, default=400, help="of a question (400)")
    parser.add_argument("--model", default="smollm2-135m", help="a model's name (smollm2-135m)")
    given = parser.parse_args()
    found = measure(given.model, given.questions, given.words)
    for kind in KINDS:
        seconds = [one.seconds for one in found[kind]]
        cached = statistics.median(one.cached for one in found[kind])
        print(f"{kind:<11} cached tokens {cached:6,.0f}   TTFT median {statistics.median(seconds):.3f} s")
    chances = {}
    for pair in (("ann, again", "ann, new"), ("bob, ann's", "bob, new")):
        one, other = ([asked.seconds for asked in found[kind]] for kind in pair)
        chances[pair] = mannwhitneyu(one, other, alternative="less").pvalue
        print(f"{pair[0]} faster than {pair[1]}: p = {chances[pair]:.2g} (Mann-Whitney, one-sided)")
    apart = [one.cached for one in found["bob, ann's"]] == [one.cached for one in found["ann, new"]]
    print(f"Bob's cached tokens {'do not ' if apart else ''}tell what Ann has asked")
    return 0 if apart and chances["bob, ann's", "bob, new"] > 0.01 else 1


if __name__ == "__main__":
    sys.exit(main())
