"""Models behind OpenAI-compatible endpoints: vLLM, llama.cpp, Ollama, and whatever else speaks their chat completions.

    backend     one as a backend: a prompt's messages out, text and token counts back
    endpoint    its HTTP: requests, streams, and what went wrong in the words of people
    text        what stands in for a tokenizer where there is none

Text goes out and comes back, no KV: an endpoint's own prefix cache is all that can be shared there.
"""

from agentmesh.remote.backend import Backoff, RemoteBackend

__all__ = ["Backoff", "RemoteBackend"]
