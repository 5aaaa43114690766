"""A mesh of two agents on a tiny random model, and a task file: what tests of evaluations evaluate."""

from __future__ import annotations

MESH = """
version: 1
model: random:tiny-llama
topology: {use: fully-connected, agents: 2}
agents:
  agent:
    role: [Solver, Checker]
    prompt: |
      {{ role }} of a team that answers
      {{ question }}
      {% for message in inbox %}
      {{ message }}
      {% endfor %}
      Now.
    generate: {max_tokens: 24}
communicator: {preset: linear, min_tokens: 8, warmup: 2, max_kl: 100.0, cost_gate: false}
run: {deterministic: true, concurrency: 2}
"""
TASK = "version: 1\nkind: math\nfile: samples.jsonl\nscorers: [gsm8k]\n"
